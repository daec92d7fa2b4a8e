"""The quickstart on many seeds: does the recipe work, or did it once?

    python bench/quickstart_seeds.py --seeds 0-19 --out runs/seeds
    python bench/quickstart_seeds.py --seeds 0-2 --shuffle-labels --out runs/shuffled

A row per seed joins bench/results/quickstart.csv as the seed ends. A seed that has a finished run
in OUT is not run again, one that was stopped goes on. At the end: the median and the range of each
measure over all seeds in that table, and the seeds that missed a target.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path

from bench import commit, device_name

from instructcore.quickstart import QuickstartConfig, run

TABLE = Path(__file__).parent / "results" / "quickstart.csv"

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
        **{name: round(rewards[name], 4) for name in ("constant", "base", "sft", "ppo")},
        "gain_low": round(low, 4),
        "gain_high": round(high, 4),
        "gap_closed": round(summary["gap_closed"], 4),
        "win_rate": round(summary["win_rate_ppo_over_sft"], 4),
        "kl": round(summary["kl"], 3),
        "accuracy": round(summary["reward_accuracy"], 4),
        "accuracy_clear": round(summary["reward_accuracy_clear"], 4),
        "n_eval": summary["n_eval"],
        "device": device_name("cpu"),
        "torch": summary["versions"]["torch"],
        "commit": commit(),
    }


def read() -> list[dict]:
    """All rows of the table, its figures as numbers."""
    if not TABLE.exists():
        return []
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    texts = ("device", "torch", "commit")
    return [{k: v if k in texts else float(v) for k, v in row.items()} for row in rows]


def write(row: dict) -> None:
    """Puts the row into the table, in place of an older one of its seed and kind."""
    key = ("shuffled", "seed")
    rows = [r for r in read() if any(r[k] != row[k] for k in key)] + [row]
    rows.sort(key=lambda r: [r[k] for k in key])
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:g}" if isinstance(v, float) else v for k, v in r.items()}
                         for r in rows)  # fmt: skip


def report(rows: list[dict], targets: dict[str, Callable[[dict], bool]]) -> None:
    print(f"\n{len(rows)} seeds: " + ", ".join(f"{int(row['seed'])}" for row in rows))
    for name in ("sft", "ppo", "gain_low", "gap_closed", "kl", "accuracy", "accuracy_clear"):
        values = [row[name] for row in rows]
        print(f"{name}: median {statistics.median(values):.3f}, "
              f"{min(values):.3f} to {max(values):.3f}")  # fmt: skip
    for name, met in targets.items():
        missed = [str(int(row["seed"])) for row in rows if not met(row)]
        print(f"{name}: " + (f"missed by seeds {', '.join(missed)}" if missed else "all"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0-19", metavar="FIRST-LAST")
    parser.add_argument("--shuffle-labels", action="store_true", help="the control")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    options = parser.parse_args()
    first, last = map(int, options.seeds.split("-"))
    for seed in range(first, last + 1):
        out = options.out / f"seed-{seed}"
        if not (out / "summary.json").exists():
            again = {"resume": out.exists(), "shuffle_labels": options.shuffle_labels}
            run(QuickstartConfig(out=str(out), seed=seed, **again))
        write(row_of(json.loads((out / "summary.json").read_text(encoding="utf-8"))))
    rows = [row for row in read() if row["shuffled"] == options.shuffle_labels]
    report(rows, CONTROL_TARGETS if options.shuffle_labels else TARGETS)


if __name__ == "__main__":
    main()
