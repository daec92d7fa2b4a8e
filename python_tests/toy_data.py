"""Files and checkpoints small enough to train on in a second."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from instructcore.data import Comparison
from instructcore.model import GPT, ModelConfig
from instructcore.tokenizer import Tokenizer

WORDS = "red green blue gold grey pink".split()

UNREAD = Comparison("", (), (), {})  # of rankings that no file held


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_text(path: Path, words: int = 600, seed: int = 0) -> Path:
    """Plain text of a few words in random order."""
    draw = random.Random(seed)
    path.write_text(" ".join(draw.choice(WORDS) for _ in range(words)), encoding="utf-8")
    return path


def write_demonstrations(path: Path, n: int = 48, seed: int = 0) -> Path:
    """A colour is named, and the response names it again."""
    draw = random.Random(seed)
    words = [draw.choice(WORDS) for _ in range(n)]
    return write_jsonl(path, [{"prompt": f"say {word}", "response": word} for word in words])


def write_comparisons(path: Path, n: int = 48, k: int = 3, seed: int = 0) -> Path:
    """k responses to each prompt; the more often one says "yes", the better it is; some tie."""
    draw = random.Random(seed)
    records = []
    for number in range(n):
        counts = [draw.randrange(3) for _ in range(k)]
        if len(set(counts)) == 1:
            counts[0] = (counts[0] + 1) % 3
        responses = [" ".join(["yes"] * c + ["no"] * (2 - c)) for c in counts]
        records.append({"prompt": f"well {number % 7}?", "responses": responses, "scores": counts})
    return write_jsonl(path, records)


def save_model(directory: Path, seed: int = 0, **shape: float) -> Path:
    """A checkpoint of a random model over bytes."""
    tokenizer = Tokenizer.bytes()
    shape = {"context": 32, "layers": 1, "heads": 2, "width": 16} | shape
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **shape)
    model = GPT(config, generator=torch.Generator().manual_seed(seed))
    model.save(directory, tokenizer)
    return directory


def command_line(stage: str, flags: list[str], **defaults: str) -> list[str]:
    """Arguments of the command line: `defaults` (name=value) where `flags` do not set them."""
    given = {flag: value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    merged = {f"--{name.replace('_', '-')}": value for name, value in defaults.items()} | given
    return [stage, *(word for pair in merged.items() for word in pair)]


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(x) for x in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def files_of(directory: Path) -> dict[str, bytes]:
    """All files below a directory, to see that nothing changed."""
    files = (f for f in sorted(directory.rglob("*")) if f.is_file())
    return {str(f.relative_to(directory)): f.read_bytes() for f in files}
