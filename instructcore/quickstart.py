"""The whole recipe on bundled data, in minutes on two CPU cores: `instructcore quickstart`.

Pre-training, supervised fine-tuning, a reward model from rankings of the tuned model's own samples,
PPO with the pre-training mix; then all three models answer held-out prompts. The gold rule of
quickstart_data stands in for the labellers: it ranks the samples that the reward model learns from,
and grades the evaluation. The policy's reward is the learned reward model; it never sees the rule.
"""

from __future__ import annotations

import json
import platform
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import __version__, evaluate, ppo, pretrain, quickstart_data, reward, sft
from .config import OptimConfig, RunConfig, check, check_options, option
from .data import Prompt, read_comparisons, read_documents, read_prompts
from .evaluate import Sample, bootstrap_interval, mean_kl, paired_bootstrap, sample_responses, wins
from .generate import SamplingParams
from .model import ModelConfig, load
from .tokenizer import Tokenizer
from .train import checkpoints_of, choose_device, last_metric, mix, newest_checkpoint

TIE = 0.05  # gold rewards nearer than this are a tie to the labeller
CLEAR = 0.5  # pairs that any labeller would order alike
RESPONSES = 4  # K, ranked per prompt
MAX_TOKENS = 48  # of a response
VOCABULARY = 2048
COMPARISON, EVALUATION, CURVE = 101, 102, 103  # streams of randomness
STAGES = ("base", "sft", "ppo")


@dataclass(frozen=True)
class QuickstartConfig:
    """Settings of `instructcore quickstart`."""

    out: str = option("", "directory of the run; default: runs/quickstart-<time>")
    seed: int = option(0, "seed of the data and of all stages", range="[0, inf)")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    resume: bool = option(False, "go on with a quickstart that was stopped, in --out")
    shuffle_labels: bool = option(
        False, "control: each ranking at random, from which nothing can be learnt"
    )

    def __post_init__(self) -> None:
        check_options(self)
        check(bool(self.out) or not self.resume, "--resume needs --out, the run to go on with")


@dataclass(frozen=True)
class Recipe:
    """The work, fixed whatever the clock says: about 250 s on a core that multiplies bfloat16."""

    pretrain: pretrain.PretrainConfig
    sft: sft.SFTConfig
    reward: reward.RewardConfig
    ppo: ppo.PPOConfig


def recipe(out: Path, data: dict[str, Path], config: QuickstartConfig) -> Recipe:
    """The settings of the four stages; each writes into its own directory under `out`."""

    def run(stage: str, **settings: Any) -> RunConfig:
        settings |= {"out": str(out / stage), "seed": config.seed, "resume": config.resume}
        return RunConfig(**settings, device=config.device)

    text = (str(data["pretrain"]),)
    return Recipe(
        pretrain.PretrainConfig(
            data=text,
            tokenizer=str(out / "data" / "tokenizer"),
            val_fraction=0.05,
            steps=500,
            batch=16,
            model=ModelConfig(layers=3, heads=4, width=128, context=1024),
            optim=OptimConfig(lr=4e-3, warmup=0.05),
            run=run("pretrain", save_every=0),
            window=128,
        ),
        sft.SFTConfig(
            init=str(out / "pretrain"),
            data=(str(data["demonstrations"]),),
            epochs=3,
            batch=32,
            optim=OptimConfig(lr=2e-3, warmup=0.03),
            run=run("sft", save_every=0),
        ),
        reward.RewardConfig(  # centred on each ranking's best: demonstrations are of mixed quality
            init=str(out / "sft"),
            data=(str(out / "data" / "comparisons.jsonl"),),
            val_fraction=0.15,
            epochs=2,
            batch=16,
            optim=OptimConfig(lr=1e-3, warmup=0.05),
            run=run("reward", save_every=0),
        ),
        ppo.PPOConfig(
            init=str(out / "sft"),
            reward=str(out / "reward"),
            prompts=(str(data["ppo_prompts"]),),
            steps=40,
            batch=256,
            minibatch=64,
            max_tokens=MAX_TOKENS,
            kl_coef=0.3,
            pretrain_data=text,
            optim=OptimConfig(lr=2e-4, schedule="cosine", warmup=5, eps=1e-5, weight_decay=0.0),
            critic_lr=6e-4,
            run=run("ppo", save_every=8, keep=100, log_every=1),
        ),
    )


def run(config: QuickstartConfig) -> Path:
    """Runs everything; returns the directory, with summary.json and report.html in it."""
    out = Path(config.out or time.strftime("runs/quickstart-%Y%m%d-%H%M%S"))
    _open(out, config)
    begin, seconds = time.perf_counter(), dict[str, float]()

    @contextmanager
    def stage(name: str, says: str) -> Iterator[None]:
        print(f"\n=== {says}", flush=True)
        start = time.perf_counter()
        yield
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    print(f"instructcore {__version__} quickstart, seed {config.seed}, into {out}")
    with stage("data", "Data: a small bilingual world, written for this purpose"):
        data = quickstart_data.write(out / "data", config.seed)
        for path in data.values():
            print(f"{path}: {sum(1 for _ in path.open(encoding='utf-8'))} lines")
        words = read_documents([data["vocabulary"]])
        Tokenizer.train(words, VOCABULARY).save(out / "data" / "tokenizer")
    plan = recipe(out, data, config)
    with stage("pretrain", "Stage 1: pre-training on raw text"):
        pretrain.run(plan.pretrain)
    with stage("sft", "Stage 2: supervised fine-tuning on demonstrations of mixed quality"):
        sft.run(plan.sft)
    with stage("sampling", f"Stage 3a: {RESPONSES} answers to each prompt, ranked"):
        compare(out, read_prompts([data["preference_prompts"]]), config)
    with stage("reward", "Stage 3b: a reward model from the rankings"):
        reward.run(plan.reward)
    with stage("ppo", "Stage 3c: PPO against the reward model, with the pre-training mix"):
        ppo.run(plan.ppo)
        critic = out / "ppo" / "critic"
        if not critic.is_symlink():
            critic.symlink_to(Path("final", "critic"))
    with stage("evaluation", "Evaluation: held-out prompts, each model at temperature 1"):
        found = assess(out, data, config)
    summary = {
        "seed": config.seed,
        "shuffle_labels": config.shuffle_labels,
        "seconds": time.perf_counter() - begin,
        "seconds_by_stage": seconds,
        **found,
        "versions": {
            "instructcore": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    from . import report

    shown = summary.pop("_shown")
    path = out / "summary.json"
    path.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    report.write(out, summary, shown)
    report.print_summary(summary, shown, out)
    return out


def _open(out: Path, config: QuickstartConfig) -> None:
    """A new directory, or with --resume that of a quickstart with the same settings."""
    settings = {"seed": config.seed, "shuffle_labels": config.shuffle_labels}
    path = out / "quickstart.json"
    taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if taken and config.resume:
        check(path.is_file(), f"--out {out} holds no quickstart to resume")
        before = json.loads(path.read_text(encoding="utf-8"))
        check(settings == before, f"--resume goes on with the same settings, {before}")
        return
    check(not taken, f"--out {out} is there already: choose another directory, or --resume")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings) + "\n", encoding="utf-8")


# ---- The labeller


def gold_of(samples: Sequence[Sample]) -> list[float]:
    """The gold reward of each sample."""
    return [
        quickstart_data.gold(s.prompt.record["task"], s.completion.text, s.ended) for s in samples
    ]


def compare(out: Path, prompts: Sequence[Prompt], config: QuickstartConfig) -> None:
    """Samples K responses to each prompt from the SFT model and writes their ranking by gold."""
    device = choose_device(config.device)
    path = newest_checkpoint(out / "sft")
    model, tokenizer = load(path, device=device), Tokenizer.load(path)
    params = SamplingParams(max_tokens=MAX_TOKENS, seed=mix(config.seed, COMPARISON))
    repeated = [prompt for prompt in prompts for _ in range(RESPONSES)]
    samples = sample_responses(model.eval(), tokenizer, repeated, params)
    golds, untied, control = gold_of(samples), 0, random.Random(config.seed)
    with (out / "data" / "comparisons.jsonl").open("w", encoding="utf-8") as file:
        for i, prompt in enumerate(prompts):
            part = slice(i * RESPONSES, (i + 1) * RESPONSES)
            ranks = rank(golds[part])
            if config.shuffle_labels:
                control.shuffle(ranks)
            untied += len(reward.pairs_of(ranks))
            row = {
                "prompt": prompt.text,
                "responses": [s.completion.text for s in samples[part]],
                "ranks": ranks,
                "gold": golds[part],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(prompts)} prompts x {RESPONSES} responses, {untied} pairs that are no tie")


def rank(golds: Sequence[float]) -> list[int]:
    """1 for the best; a response within TIE of the one before it in the order shares its rank."""
    order = sorted(range(len(golds)), key=lambda i: -golds[i])
    ranks = [1] * len(golds)
    for before, i in zip(order, order[1:], strict=False):
        ranks[i] = ranks[before] + (golds[before] - golds[i] >= TIE)
    return ranks


# ---- Evaluation


def assess(out: Path, data: dict[str, Path], config: QuickstartConfig) -> dict[str, Any]:
    """All measures of the three models on the held-out prompts, and what the report shows."""
    device = choose_device(config.device)
    prompts = read_prompts([data["eval_prompts"]])
    shown_prompts = read_prompts([data["samples"]])
    paths = {name: newest_checkpoint(out / stage) for name, stage in
             zip(STAGES, ("pretrain", "sft", "ppo"), strict=True)}  # fmt: skip
    models = {name: load(path, device=device).eval() for name, path in paths.items()}
    tokenizer = Tokenizer.load(paths["sft"])
    params = SamplingParams(max_tokens=MAX_TOKENS, seed=mix(config.seed, EVALUATION))
    samples = {n: sample_responses(m, tokenizer, prompts, params) for n, m in models.items()}
    golds = {name: gold_of(s) for name, s in samples.items()}
    constant, constant_text = best_constant(prompts, data)
    means = {name: bootstrap_interval(g, config.seed) for name, g in golds.items()}
    gain = paired_bootstrap(golds["ppo"], golds["sft"], config.seed)
    families = sorted({p.record["task"]["family"] for p in prompts})
    by_task = {
        family: {
            name: bootstrap_interval(
                [
                    g
                    for g, p in zip(golds[name], prompts, strict=True)
                    if p.record["task"]["family"] == family
                ],
                config.seed,
            )._asdict()
            for name in STAGES
        }
        for family in families
    }
    greedy = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    answers = {n: sample_responses(m, tokenizer, shown_prompts, greedy) for n, m in models.items()}
    ranked = sorted(range(len(prompts)), key=lambda i: golds["ppo"][i])
    return {
        "pretrain_loss": last_metric(out / "pretrain", "val_loss"),
        "sft_loss": last_metric(out / "sft", "val_loss"),
        "reward_accuracy": last_metric(out / "reward", "accuracy"),
        "reward_accuracy_clear": clear_accuracy(out, config),
        "gold_reward": {"constant": constant, **{n: i.mean for n, i in means.items()}},
        "gold_reward_ci": {
            **{name: [i.low, i.high] for name, i in means.items()},
            "ppo_minus_sft": [gain.low, gain.high],
        },
        "gold_by_task": by_task,
        "gap_closed": gain.mean / (1 - means["sft"].mean),
        "kl": mean_kl(models["ppo"], models["sft"], samples["ppo"]),
        "win_rate_ppo_over_sft": sum(wins(golds["ppo"], golds["sft"])) / len(prompts),
        "n_eval": len(prompts),
        "parameters": models["ppo"].num_parameters(),
        "_shown": {
            "constant": constant_text,
            "curve": over_training(out, models["sft"], prompts[::4], tokenizer, config),
            "samples": [
                {
                    "prompt": p.text,
                    "held_out": p.record["task"]["held_out"],
                    **{name: answers[name][i].completion.text for name in STAGES},
                }
                for i, p in enumerate(shown_prompts)
            ],
            "extremes": [
                {
                    "prompt": prompts[i].text,
                    "sft": samples["sft"][i].completion.text,
                    "ppo": samples["ppo"][i].completion.text,
                    "gold": [golds["sft"][i], golds["ppo"][i]],
                }
                for i in (*ranked[-8:], *ranked[:8])
            ],
        },
    }


def best_constant(prompts: Sequence[Prompt], data: dict[str, Path]) -> tuple[float, str]:
    """The best mean gold reward of any one answer to all prompts, among 200 demonstrations."""
    with data["demonstrations"].open(encoding="utf-8") as file:
        candidates = {
            json.loads(line)["response"] for _, line in zip(range(200), file, strict=False)
        }
    tasks = [prompt.record["task"] for prompt in prompts]
    means = {
        text: sum(quickstart_data.gold(task, text, True) for task in tasks) / len(tasks)
        for text in sorted(candidates)
    }
    best = max(means, key=lambda text: means[text])
    return means[best], best


def clear_accuracy(out: Path, config: QuickstartConfig) -> float:
    """The reward model's share of right pairs on held-out prompts, where gold differs by CLEAR."""
    path = newest_checkpoint(out / "reward")
    model, tokenizer = load(path, device=choose_device(config.device)).eval(), Tokenizer.load(path)
    unused = dict.fromkeys(("pretrain", "demonstrations", "ppo_prompts"), out)
    plan, context = recipe(out, unused, config).reward, model.config.context
    untied = [c for c in read_comparisons(plan.data) if reward.pairs_of(c.ranks)]
    rankings = reward.encode(untied, tokenizer, context, plan.overlong)
    _, held_out = sft.split(rankings, plan.val_fraction, config.seed)
    right = total = 0
    for ranking in held_out:
        with torch.no_grad():
            scores = reward.response_scores(model, ranking.rows).tolist()
        gold = ranking.source.record["gold"]
        clear = [
            (i, j) for i in range(len(gold)) for j in range(len(gold)) if gold[i] - gold[j] >= CLEAR
        ]
        right += sum(scores[i] > scores[j] for i, j in clear)
        total += len(clear)
    return right / max(1, total)


def over_training(
    out: Path,
    reference: Any,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    config: QuickstartConfig,
) -> list[dict[str, float]]:
    """Gold reward, reward model's score and KL of PPO's checkpoints, on a share of the prompts."""
    device = choose_device(config.device)
    judge = evaluate.make_judge(str(out / "reward"), tokenizer, device, torch.float32)
    params = SamplingParams(max_tokens=MAX_TOKENS, seed=mix(config.seed, CURVE))
    points = []
    for path in (out / "sft" / "final", *checkpoints_of(out / "ppo"), out / "ppo" / "final"):
        model = load(path, device=device).eval()
        samples = sample_responses(model, tokenizer, prompts, params)
        golds, scores = gold_of(samples), judge(samples)
        points.append(
            {
                "kl": mean_kl(model, reference, samples),
                "gold": sum(golds) / len(golds),
                "score": sum(scores) / len(scores),
            }
        )
    return points
