"""The examples run, and show what they say."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from tolerance import EPS

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(monkeypatch, threads):
    threads(1)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    return importlib.import_module


def test_finetune_llama(example, capsys):
    """Losses of two runs of 5 steps: within 4 units in the last place, and learning."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    without, ours = (torch.tensor(x) for x in example("finetune_llama").main(4))
    assert (without - ours).abs().max() <= 4 * EPS[torch.float32] * without.max()
    assert ours[-1] < ours[0]
    printed = capsys.readouterr().out
    assert "attention sdpa -> instructcore" in printed and printed.count(" MiB") == 2


@pytest.mark.parametrize("name", ["trl_sft", "trl_grpo"])
def test_trl(example, name, capsys):
    """4 steps of TRL's trainers: the same values but for rounding, which the weights accumulate."""
    for library in ("trl", "datasets"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    found = example(name).main(["--steps=4", "--length=16", "--threads=1"])
    for value in {"loss", "reward", "entropy"} & set(found["with"]):
        without, ours = (torch.tensor(found[x][value]) for x in ("without", "with"))
        assert len(ours) >= 2  # GRPO tells the reward of each draw
        torch.testing.assert_close(ours, without, rtol=1e-5, atol=1e-6)
    printed = capsys.readouterr().out
    assert "ChunkedLogProbFunction -> instructcore" in printed and printed.count(" MiB") == 2


def test_ppo_cart_pole(example):
    """The pole falls after some twenty steps at first."""
    curve = example("ppo_cart_pole").main(15)
    assert curve[0] < 50 and curve[-1] > 150, curve
