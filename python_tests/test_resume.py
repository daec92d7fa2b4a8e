"""Killed and resumed, every stage leaves the bits of a run that nobody disturbed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from kill_resume import check_kills
from toy_data import (
    read_metrics,
    save_model,
    write_comparisons,
    write_demonstrations,
    write_text,
)

from instructcore.model import GPT, ModelConfig
from instructcore.tokenizer import Tokenizer
from instructcore.train import newest_checkpoint

QUICK = "--save-every 3 --log-every 2 --device cpu --dtype float32".split()


@pytest.fixture
def kills(full) -> int:
    return 100 if full else 5


def test_pretrain(tmp_path, kills):
    data = write_text(tmp_path / "text.txt")
    shape = "--layers 1 --heads 2 --width 16 --context 16 --dropout 0.1 --tokenizer bpe".split()
    shape += "--vocab-size 270 --batch 4 --micro-batch 2 --steps 25 --eval-every 10".split()
    check_kills(["pretrain", "--data", str(data), *shape, *QUICK], tmp_path, kills, seed=1)


def test_sft(tmp_path, kills):
    data, base = write_demonstrations(tmp_path / "data.jsonl"), save_model(tmp_path / "base")
    text = write_text(tmp_path / "text.txt")
    settings = ["--pretrain-data", str(text), *"--epochs 3 --batch 8 --dropout 0.1".split()]
    arguments = ["sft", "--init", str(base), "--data", str(data), *settings, *QUICK]
    check_kills(arguments, tmp_path, kills, seed=2)


def test_reward(tmp_path, kills):
    data, base = write_comparisons(tmp_path / "data.jsonl"), save_model(tmp_path / "base")
    arguments = ["reward", "--init", str(base), "--data", str(data), *"--epochs 3".split()]
    check_kills([*arguments, "--batch", "8", *QUICK], tmp_path, kills, seed=3)


def test_dpo(tmp_path, kills):
    data, base = write_comparisons(tmp_path / "data.jsonl"), save_model(tmp_path / "base")
    arguments = ["dpo", "--init", str(base), "--data", str(data), *"--epochs 3".split()]
    arguments += "--batch 8 --micro-batch 4 --eval-every 4 --lr 1e-3".split()
    check_kills([*arguments, *QUICK], tmp_path, kills, seed=5)


@pytest.mark.checklist(40)
def test_ppo(tmp_path, kills):
    """Policy, critic, their optimisers, the averages and the adaptive KL coefficient."""
    text, prompts = write_text(tmp_path / "text.txt"), write_demonstrations(tmp_path / "p.jsonl")
    model = GPT(ModelConfig(vocab_size=Tokenizer.bytes().vocab_size, context=32, layers=1, heads=2,
                            width=16))  # fmt: skip
    tokenizer = Tokenizer.bytes()
    tokenizer.add_specials()
    model.resize_vocab(tokenizer.vocab_size)
    model.save(tmp_path / "init", tokenizer)
    model.to_scalar_head().save(tmp_path / "reward", tokenizer)
    arguments = ["ppo", "--init", str(tmp_path / "init"), "--reward", str(tmp_path / "reward")]
    arguments += ["--prompts", str(prompts), "--pretrain-data", str(text)]
    arguments += "--steps 12 --batch 8 --minibatch 4 --micro-batch 2 --inner-epochs 2".split()
    arguments += "--max-tokens 6 --kl-target 0.5 --ptx-batch 2 --ptx-context 16".split()
    check_kills([*arguments, *QUICK], tmp_path, kills, seed=4)


def test_ctrl_c_in_a_real_process(tmp_path):
    """SIGINT: the step ends, a checkpoint is written, the exit code is 130; --resume finishes."""
    data, out = write_text(tmp_path / "text.txt"), tmp_path / "run"
    shape = "--layers 1 --heads 2 --width 16 --context 16 --tokenizer bytes --batch 4".split()
    arguments = ["pretrain", "--data", str(data), "--out", str(out), "--steps", "1000", *shape]
    command = [sys.executable, "-m", "instructcore", *arguments, "--log-every", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/")
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() or len(read_metrics(out)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"--resume" in errors and b"Traceback" not in errors
    step = read_metrics(out)[-1]["step"]
    assert 3 <= step < 1000 and newest_checkpoint(out).name == f"step-{step}"
