"""One step of every stage, by one process or by those that torchrun starts. Arguments: DATA OUT.

DATA has text.txt, demonstrations.jsonl, comparisons.jsonl and the checkpoint model/.
"""

from __future__ import annotations

import sys
from pathlib import Path

from instructcore.cli import main


def stages(data: Path, out: Path) -> dict[str, list[str]]:
    """The arguments of every run, by the name of its directory."""
    text, demonstrations, comparisons = (
        str(data / name) for name in ("text.txt", "demonstrations.jsonl", "comparisons.jsonl")
    )
    init = ["--init", str(data / "model")]
    shape = ["--context", "32", "--layers", "1", "--heads", "2", "--width", "16"]
    ptx = ["--pretrain-data", text, "--ptx-batch", "6", "--ptx-context", "16"]
    ppo = ["ppo", *init, "--prompts", demonstrations, "--batch", "16", "--minibatch", "16"]
    ppo += ["--inner-epochs", "1", "--max-tokens", "8", "--steps", "1"]
    runs = {
        "pretrain": ["pretrain", "--data", text, "--vocab-size", "280", *shape]
        + ["--steps", "1", "--batch", "8", "--micro-batch", "2"],
        "sft": ["sft", *init, "--data", demonstrations, "--batch", "36", "--epochs", "1"]
        + ["--pretrain-data", text, "--pretrain-mix", "0.5", "--val-fraction", "0.1"],
        "reward": ["reward", *init, "--data", comparisons, "--batch", "36", "--epochs", "1"],
        "dpo": ["dpo", *init, "--data", comparisons, "--batch", "36", "--epochs", "1"],
        "ppo": [*ppo, "--reward", str(out / "reward"), *ptx, "--ema", "0.9", "--strict"],
        "grpo": [*ppo, "--reward", str(out / "reward"), "--algorithm", "grpo"]
        + ["--group-size", "4", "--micro-batch", "2"],
    }
    common = ["--dtype", "float32", "--device", "cpu", "--grad-clip", "0"]
    return {name: [*flags, *common, "--out", str(out / name)] for name, flags in runs.items()}


if __name__ == "__main__":
    for name, arguments in stages(*map(Path, sys.argv[1:3])).items():
        if main(arguments):
            sys.exit(f"{name} failed")
