"""The quickstart on many seeds: does the recipe work, or did it once?

    python bench/quickstart_seeds.py --seeds 0-19 --out runs/seeds
    python bench/quickstart_seeds.py --seeds 0-2 --shuffle-labels --out runs/shuffled
    python bench/quickstart_seeds.py --readme   # the table of the READMEs, from the results

A row per seed joins bench/results/runs/quickstart.csv as the seed ends. A seed that has a finished
run in OUT is not run again, one that was stopped goes on. At the end: the median and the range of
each measure over all seeds in that table, and the seeds that missed a target.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import rows
from bench import commit, device_name
from plot import ROOT, replace_block

from instructcore.quickstart import QuickstartConfig, run

HEADERS = {
    "README.md": "seed | seconds | constant | base | SFT | PPO | PPO − SFT, 95 % | gap closed | "
    "KL | reward model, all pairs | pairs where gold differs by 0.5",
    "README.zh.md": "种子 | 秒 | 常数回答 | 预训练 | SFT | PPO | PPO − SFT，95 % | 补上的差距 | "
    "KL | 奖励模型，全部对 | gold 相差 0.5 以上的对",
}

# What a seed is held to. A control is to gain nothing instead.
TARGETS: dict[str, Callable[[dict], bool]] = {
    "base < SFT < PPO": lambda r: r["base"] < r["sft"] < r["ppo"],
    "PPO - SFT above 0.05 (95 %)": lambda r: r["gain_low"] > 0.05,
    "60 % of the gap closed": lambda r: r["gap_closed"] >= 0.6,
    "KL at most 5": lambda r: r["kl"] <= 5,
    "SFT at most 0.75": lambda r: r["sft"] <= 0.75,
    "best constant at most 0.6": lambda r: r["constant"] <= 0.6,
    "reward model 85 %": lambda r: r["accuracy"] >= 0.85,
    "reward model 95 % on clear pairs": lambda r: r["accuracy_clear"] >= 0.95,
}
CONTROL_TARGETS: dict[str, Callable[[dict], bool]] = {
    "no significant gain": lambda r: r["gain_low"] <= 0,
}


def row_of(summary: dict) -> dict:
    """The figures of one run, from its summary.json."""
    rewards, (low, high) = summary["gold_reward"], summary["gold_reward_ci"]["ppo_minus_sft"]
    return {
        "seed": summary["seed"],
        "shuffled": int(summary["shuffle_labels"]),
        "seconds": round(summary["seconds"]),
        **{name: round(rewards[name], 6) for name in ("constant", "base", "sft", "ppo")},
        "gain_low": round(low, 6),
        "gain_high": round(high, 6),
        "gap_closed": round(summary["gap_closed"], 6),
        "win_rate": round(summary["win_rate_ppo_over_sft"], 6),
        "kl": round(summary["kl"], 6),
        "accuracy": round(summary["reward_accuracy"], 6),
        "accuracy_clear": round(summary["reward_accuracy_clear"], 6),
        "n_eval": summary["n_eval"],
        "device": device_name("cpu"),
        "torch": summary["versions"]["torch"],
        "commit": commit(),
    }


def numbers(row: dict[str, str]) -> dict[str, float]:
    """The figures of a row of the table."""
    return {k: float(v) for k, v in row.items() if k not in ("device", "torch", "commit")}


def report(found: list[dict], targets: dict[str, Callable[[dict], bool]]) -> None:
    print(f"\n{len(found)} seeds: " + ", ".join(f"{int(row['seed'])}" for row in found))
    for name in ("sft", "ppo", "gain_low", "gap_closed", "kl", "accuracy", "accuracy_clear"):
        values = [row[name] for row in found]
        print(f"{name}: median {statistics.median(values):.3f}, "
              f"{min(values):.3f} to {max(values):.3f}")  # fmt: skip
    for name, met in targets.items():
        missed = [str(int(row["seed"])) for row in found if not met(row)]
        print(f"{name}: " + (f"missed by seeds {', '.join(missed)}" if missed else "all"))


def table(found: list[dict], header: str) -> Iterator[str]:
    """Lines of Markdown: a row for each seed; the controls after the others."""
    yield f"| {header} |"
    yield "|---" * (header.count("|") + 1) + "|"
    for r in found:
        name = f"{int(r['seed'])}" + (", `--shuffle-labels`" if r["shuffled"] else "")
        means = " | ".join(f"{r[key]:.3f}" for key in ("constant", "base", "sft", "ppo"))
        gain = f"{r['gain_low']:.3f} .. {r['gain_high']:.3f}".replace("-", "−")
        closed = f"{r['gap_closed']:.0%} | {r['kl']:.2f}"
        right = f"{r['accuracy']:.1%} | {r['accuracy_clear']:.1%}"
        shares = f"{closed} | {right}".replace("%", " %").replace("-", "−")
        yield f"| {name} | {r['seconds']:.0f} | {means} | {gain} | {shares} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0-19", metavar="FIRST-LAST")
    parser.add_argument("--shuffle-labels", action="store_true", help="the control")
    parser.add_argument("--out", type=Path, help="default runs/seeds, or runs/shuffled")
    parser.add_argument("--readme", action="store_true", help="run nothing, write the tables")
    options = parser.parse_args()
    options.out = options.out or Path("runs", "shuffled" if options.shuffle_labels else "seeds")
    if options.readme:
        if not (found := [numbers(row) for row in rows.read("quickstart")]):
            raise SystemExit("no runs in bench/results/runs/quickstart.csv")
        for name, header in HEADERS.items():
            replace_block(ROOT / name, "quickstart-table", table(found, header))
        return
    first, last = map(int, options.seeds.split("-"))
    for seed in range(first, last + 1):
        out = options.out / f"seed-{seed}"
        if not (out / "summary.json").exists():
            again = {"resume": out.exists(), "shuffle_labels": options.shuffle_labels}
            run(QuickstartConfig(out=str(out), seed=seed, **again))
        row = row_of(json.loads((out / "summary.json").read_text(encoding="utf-8")))
        figures = numbers({name: str(value) for name, value in row.items()})
        if figures not in map(numbers, rows.read("quickstart")):  # else its commit is there, too
            rows.put("quickstart", row, key=("shuffled", "seed"))
    found = [numbers(row) for row in rows.read("quickstart")]
    found = [row for row in found if row["shuffled"] == options.shuffle_labels]
    report(found, CONTROL_TARGETS if options.shuffle_labels else TARGETS)


if __name__ == "__main__":
    main()
