"""Every stage on real text: GSM8K's problems, and rankings of other models' solutions to them.

    python bench/gsm8k.py --train gsm8k_train.jsonl --solutions gsm8k_solutions.jsonl

`pretrain` on the training problems as text, `sft` on them, `reward` and `dpo` on graded solutions
to the test problems, four to each, but for a fifth of those whose solutions differ in grade;
`ppo --algorithm grpo` on the training problems, with the verifiable reward of
examples/gsm8k_reward.py. On that fifth the policies are graded, and pairs of a right and a wrong
solution ordered, by models and by two rules.
`majority`: the better one is that whose answer more of the four arrive at; `length`: the shorter.
A run in OUT that was stopped goes on.

--record writes the outcome to bench/results/gsm8k.md.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import commit, device_name
from plot import ROOT

from instructcore import dpo, ppo, pretrain, reward, sft
from instructcore.data import Prompt, read_jsonl
from instructcore.evaluate import sample_responses
from instructcore.generate import SamplingParams
from instructcore.model import ModelConfig, load
from instructcore.tokenizer import Tokenizer
from instructcore.train import choose_device, last_metric, newest_checkpoint

sys.path.insert(0, str(ROOT))
from examples import gsm8k_reward

MAX_TOKENS = 160  # of a solution
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
    """The settings of each stage, in their order; those not named are the stage's defaults."""
    out = options.out

    def at(config: type, name: str, lr: float, **settings: Any) -> Any:
        own = {"out": str(out / name), "resume": (out / name).exists(), "log_every": 1}
        run = replace(config.run, seed=options.seed, device=options.device, **own)
        return config(**settings, optim=replace(config.optim, lr=lr), run=run)

    ranked = {"data": (str(options.solutions),), "val_fraction": 0.2, "epochs": 2, "batch": 16}
    tuned = {"init": str(out / "sft")}
    return {
        "pretrain": at(
            pretrain.PretrainConfig,
            "pretrain",
            2e-3,
            data=(str(out / "gsm8k.txt"),),
            vocab_size=4096,
            steps=1000,
            batch=16,
            window=256,
            model=ModelConfig(layers=4, heads=4, width=192, context=768),
        ),
        "sft": at(
            sft.SFTConfig,
            "sft",
            1e-3,
            init=str(out / "pretrain"),
            data=(str(options.train),),
            batch=16,
        ),
        "reward": at(reward.RewardConfig, "reward", 3e-4, **tuned, **ranked),
        "dpo": at(dpo.DPOConfig, "dpo", 1e-4, **tuned, **ranked),
        "grpo": at(
            ppo.PPOConfig,
            "grpo",
            1e-4,
            **tuned,
            reward="examples.gsm8k_reward:reward",
            prompts=(str(options.train),),
            algorithm="grpo",
            group_size=8,
            steps=30,
            max_tokens=MAX_TOKENS,
        ),
    }


def write_text(train: Path, out: Path) -> None:
    rows = read_jsonl(train)
    text = "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows)
    out.write_text(text + "\n", encoding="utf-8")


# ---- Rules: scores of the solutions to one problem, the higher the better


def majority(solutions: Sequence[str]) -> list[float]:
    answers = [gsm8k_reward.final_answer(solution) for solution in solutions]
    return [float(sum(a is not None and a == b for b in answers)) for a in answers]


def length(solutions: Sequence[str]) -> list[float]:
    return [-float(len(solution)) for solution in solutions]


# ---- The outcome


def held_out_of(config: reward.RewardConfig) -> list[reward.Ranking]:
    """The rankings that the stages of this seed and share hold out."""
    path = newest_checkpoint(Path(config.run.out))
    tokenizer, context = Tokenizer.load(path), load(path).config.context
    return reward.read_rankings(config, tokenizer, context)[1]


def solved(run: Path, rankings: Sequence[reward.Ranking]) -> tuple[float, float, float]:
    """The share of their problems that greedy answers get right, with its 95 % interval."""
    path = newest_checkpoint(run)
    records = [{"answer": r.source.record["ground_truth"]} for r in rankings]
    prompts = [Prompt(r.source.prompt, record) for r, record in zip(rankings, records, strict=True)]
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    samples = sample_responses(load(path).eval(), Tokenizer.load(path), prompts, params)
    texts = [s.prompt.text for s in samples], [s.completion.text for s in samples]
    return reward.accuracy(gsm8k_reward.reward(*texts, records), [1] * len(records))


def finite(out: Path) -> bool:
    """Whether every metric that any stage wrote is a number: what is none is written as null."""
    rows = [row for path in sorted(out.glob("*/metrics.jsonl")) for row in read_jsonl(path)]
    return all(value is not None for row in rows for value in row.values())


def percent(share: Sequence[float]) -> str:
    mean, low, high = (f"{100 * x:.1f}" for x in share)
    return f"{mean} % ({low} to {high})"


def outcome(options: argparse.Namespace, plan: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    out, held_out = options.out, held_out_of(plan["reward"])
    yield "# GSM8K"
    yield ""
    today = datetime.date.today().isoformat()
    device = device_name(choose_device(options.device).type)
    yield f"`python bench/gsm8k.py`, {today}, commit {commit()}, seed {options.seed}, on {device}."
    yield ""
    pairs = sum(len(ranking.pairs) for ranking in held_out)
    yield f"| {pairs} pairs of a right and a wrong solution, held out | ordered rightly, 95 % |"
    yield "|---|---:|"
    for name in ("reward", "dpo"):
        names = ("accuracy", "accuracy_low", "accuracy_high")
        yield f"| `{name}` | {percent([last_metric(out / name, key) for key in names])} |"
    for rule in (majority, length):
        scores = [score for ranking in held_out for score in rule(ranking.source.responses)]
        found = reward.order_accuracy(held_out, scores)
        yield f"| {rule.__name__} | {percent([*found.values()])} |"
    yield ""
    yield f"| {len(held_out)} problems, held out | solved by greedy answers, 95 % |"
    yield "|---|---:|"
    for name in ("sft", "dpo", "grpo"):
        yield f"| `{name}` | {percent(solved(out / name, held_out))} |"
    yield ""
    yield "| GRPO on training problems | first 5 iterations | last 5 |"
    yield "|---|---:|---:|"
    rows = read_jsonl(out / "grpo" / "metrics.jsonl")
    for metric, name in GRPO.items():
        ends = (fmean(row[metric] for row in part) for part in (rows[:5], rows[-5:]))
        yield f"| {name} | " + " | ".join(f"{value:.3g}" for value in ends) + " |"
    yield ""
    losses = ", ".join(
        f"{name} {last_metric(out / name, 'val_loss'):.3f}" for name in ("reward", "dpo")
    )
    yield f"Held-out losses: {losses}. All metrics finite: {'yes' if finite(out) else 'NO'}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("train", "solutions"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, default=Path("runs", "gsm8k"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--record", action="store_true", help="write bench/results/gsm8k.md")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.train, options.out / "gsm8k.txt")
    plan = stages(options)
    runs = {"pretrain": pretrain, "sft": sft, "reward": reward, "dpo": dpo, "grpo": ppo}
    for name, stage in runs.items():
        stage.run(plan[name])
    text = "\n".join(outcome(options, plan)) + "\n"
    print(text)
    if options.record:
        (ROOT / "bench" / "results" / "gsm8k.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
