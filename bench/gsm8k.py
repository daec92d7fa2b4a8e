"""Every stage on real text: GSM8K's problems, and rankings of other models' solutions to them.

    python bench/gsm8k.py --train gsm8k_train.jsonl --test gsm8k_test.jsonl \
        --solutions gsm8k_solutions.jsonl --out runs/gsm8k

`pretrain` on the training problems as text, `sft` on them, `reward` and `dpo` on the graded
solutions (four to a problem), `ppo --algorithm grpo` with the verifiable reward of
examples/gsm8k_reward.py. The held-out pairs, a right and a wrong solution to one problem, are also
ordered by two rules: by `majority` the better solution is the one whose answer more of the others
arrive at, by `length` the shorter. A run in OUT that was stopped goes on.

--record writes the outcome to bench/results/gsm8k.md.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench import commit, device_name
from plot import ROOT

from instructcore import dpo, ppo, pretrain, reward, sft
from instructcore.config import OptimConfig, RunConfig
from instructcore.data import Comparison, read_comparisons, read_jsonl, read_prompts
from instructcore.errors import UserError
from instructcore.evaluate import sample_responses
from instructcore.generate import SamplingParams
from instructcore.model import ModelConfig, load
from instructcore.tokenizer import Tokenizer
from instructcore.train import newest_checkpoint

sys.path.insert(0, str(ROOT))
from examples import gsm8k_reward

MAX_TOKENS = 160  # of a solution
RULES = ("majority", "length")
GRPO = {  # the metrics that one looks at: what they are called in the table
    "objective/score": "share of right answers",
    "objective/kl": "KL, nats per response",
    "objective/entropy": "entropy, nats per response",
    "rollout/length": "length, tokens",
    "rollout/eos_rate": "share that ends",
    "ppo/clip_fraction": "share of ratios clipped",
    "ppo/grad_norm": "gradient norm",
}


def stages(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of each stage, in their order."""
    out, solutions = options.out, (str(options.solutions),)

    def run(name: str) -> RunConfig:
        return RunConfig(out=str(out / name), seed=options.seed, resume=(out / name).exists())

    ranked = {"init": str(out / "sft"), "data": solutions, "epochs": 2, "batch": 16}
    return {
        "pretrain": pretrain.PretrainConfig(
            data=(str(out / "gsm8k.txt"),),
            tokenizer="bpe",
            vocab_size=4096,
            steps=1000,
            batch=16,
            window=256,
            model=ModelConfig(layers=4, heads=4, width=192, context=768),
            optim=OptimConfig(lr=2e-3),
            run=run("pretrain"),
        ),
        "sft": sft.SFTConfig(
            init=str(out / "pretrain"),
            data=(str(options.train),),
            epochs=2,
            batch=16,
            optim=OptimConfig(lr=1e-3),
            run=run("sft"),
        ),
        "reward": reward.RewardConfig(
            **ranked, val_fraction=0.2, optim=OptimConfig(lr=3e-4), run=run("reward")
        ),
        "dpo": dpo.DPOConfig(
            **ranked, val_fraction=0.2, optim=OptimConfig(lr=1e-4), run=run("dpo")
        ),
        "grpo": ppo.PPOConfig(
            init=str(out / "sft"),
            reward="examples.gsm8k_reward:reward",
            prompts=(str(options.train),),
            algorithm="grpo",
            group_size=8,
            steps=30,
            batch=128,
            minibatch=32,
            max_tokens=MAX_TOKENS,
            optim=OptimConfig(lr=1e-4, eps=1e-5, weight_decay=0.0),
            run=run("grpo"),
        ),
    }


def write_text(train: Path, out: Path) -> None:
    rows = read_jsonl(train)
    text = "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows)
    out.write_text(text + "\n", encoding="utf-8")


def scores_by(rule: str, comparison: Comparison) -> list[float]:
    """The rule's scores of the solutions to one problem; the higher the better."""
    if rule == "length":
        return [-float(len(response)) for response in comparison.responses]
    answers = [gsm8k_reward.final_answer(response) for response in comparison.responses]
    return [float(sum(a is not None and a == b for b in answers)) for a in answers]


def held_out_accuracies(config: Any) -> dict[str, tuple[float, float, float, int]]:
    """Share of held-out pairs ordered rightly, its 95 % interval, pairs: by each rule, by model."""
    path = newest_checkpoint(Path(config.run.out))
    tokenizer, context = Tokenizer.load(path), load(path).config.context
    kept = []  # (comparison, ranking): ties and overlong ones are left out, as the stage does
    for comparison in read_comparisons(config.data):
        with suppress(UserError):
            if reward.pairs_of(comparison.ranks):
                ranking = reward.encode([comparison], tokenizer, context, "error")[0]
                kept.append((comparison, ranking))
    _, held_out = sft.split(kept, config.val_fraction, config.run.seed)
    comparisons, rankings = zip(*held_out, strict=True)
    pairs = sum(len(ranking.pairs) for ranking in rankings)
    found = {}
    for rule in RULES:
        scores = [score for c in comparisons for score in scores_by(rule, c)]
        found[rule] = (*reward.order_accuracy(rankings, scores).values(), pairs)
    return found


def solved(run: Path, prompts: Sequence, limit: int = 300) -> tuple[float, float, float]:
    """The share of test problems that greedy answers get right, with its 95 % interval."""
    path = newest_checkpoint(run)
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    samples = sample_responses(load(path).eval(), Tokenizer.load(path), prompts[:limit], params)
    texts = [s.prompt.text for s in samples], [s.completion.text for s in samples]
    right = gsm8k_reward.reward(*texts, [s.prompt.record for s in samples])
    return reward.accuracy(right, [1] * len(right))


def finite(out: Path) -> bool:
    """Whether every metric that any stage wrote is a number."""
    rows = [row for path in sorted(out.glob("*/metrics.jsonl")) for row in read_jsonl(path)]
    return all(math.isfinite(value) for row in rows for value in row.values())


def last(run: Path, metric: str) -> float:
    return next(row[metric] for row in reversed(read_jsonl(run / "metrics.jsonl")) if metric in row)


def percent(share: Sequence[float]) -> str:
    mean, low, high = (f"{100 * x:.1f}" for x in share[:3])
    return f"{mean} % ({low} to {high})"


def outcome(options: argparse.Namespace, plan: dict[str, Any], seconds: float) -> Iterator[str]:
    """Lines of Markdown."""
    out = options.out
    yield "# GSM8K"
    yield ""
    today = datetime.date.today().isoformat()
    yield f"`python bench/gsm8k.py`, {today}, commit {commit()}; seed {options.seed}."
    yield ""
    yield "| held-out pairs, a right and a wrong solution | ordered rightly, 95 % | pairs |"
    yield "|---|---|---:|"
    by_rule = held_out_accuracies(plan["reward"])
    pairs = by_rule["length"][-1]
    for name in ("reward", "dpo"):
        names = ("accuracy", "accuracy_low", "accuracy_high")
        yield f"| `{name}` | {percent([last(out / name, key) for key in names])} | {pairs} |"
    for rule, found in by_rule.items():
        yield f"| {rule} | {percent(found)} | {pairs} |"
    yield ""
    yield "| GRPO | first 5 iterations | last 5 |"
    yield "|---|---:|---:|"
    rows = read_jsonl(out / "grpo" / "metrics.jsonl")
    for metric, name in GRPO.items():
        ends = (sum(row[metric] for row in part) / 5 for part in (rows[:5], rows[-5:]))
        yield f"| {name} | " + " | ".join(f"{value:.3g}" for value in ends) + " |"
    yield ""
    yield "| test problems, greedy | solved, 95 % |"
    yield "|---|---|"
    prompts = read_prompts([options.test])
    for name in ("sft", "dpo", "grpo"):
        yield f"| `{name}` | {percent(solved(out / name, prompts))} |"
    yield ""
    losses = ", ".join(f"{name} {last(out / name, 'val_loss'):.3f}" for name in list(plan)[:4])
    yield f"Held-out losses: {losses}. All metrics finite: {'yes' if finite(out) else 'NO'}."
    yield f"{seconds:.0f} s on {device_name('cpu')}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("train", "test", "solutions"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, default=Path("runs", "gsm8k"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write bench/results/gsm8k.md")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.train, options.out / "gsm8k.txt")
    begin, plan = time.perf_counter(), stages(options)
    runs = {"pretrain": pretrain, "sft": sft, "reward": reward, "dpo": dpo, "grpo": ppo}
    for name, stage in runs.items():
        stage.run(plan[name])
    text = "\n".join(outcome(options, plan, time.perf_counter() - begin)) + "\n"
    print(text)
    if options.record:
        (ROOT / "bench" / "results" / "gsm8k.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
