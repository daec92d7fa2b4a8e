"""A run killed (SIGKILL) at random moments and resumed must leave what one left alone leaves.

`check_kills(arguments, tmp_path, kills)` does it for any command that makes a run. Each run is a
process of its own, forked from a server that has imported everything: it costs its own work alone.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

import torch
from safetensors.torch import load_file

from instructcore.train import WALL_CLOCK, is_complete

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "torch.utils.tensorboard", "safetensors.torch", "tokenizers", "instructcore.cli"]
    + [f"instructcore.{stage}" for stage in ("pretrain", "sft", "reward", "dpo", "ppo")]
)


def _main(arguments: list[str], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    from instructcore.cli import main

    sys.exit(main(arguments))


def start(arguments: list[str], log: Path) -> multiprocessing.process.BaseProcess:
    """The command line in a process of its own, on one thread; its output goes to `log`."""
    _ensure_server()
    process = CONTEXT.Process(target=_main, args=(arguments, log))
    process.start()
    return process


def _ensure_server() -> None:
    """The server looks for modules where it is started: not in a clone, whose sources lack _C."""
    here = os.getcwd()
    os.chdir(tempfile.gettempdir())
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(here)


def finish(process: multiprocessing.process.BaseProcess, log: Path, timeout: float = 120.0) -> None:
    process.join(timeout)
    assert process.exitcode == 0, log.read_text()


def metrics_of(run: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in WALL_CLOCK} for x in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """All tensors of final/ (state/ among them), the trainer's counters, the metrics: equal."""
    files = sorted((one / "final").rglob("*.safetensors"))
    assert one / "final" / "state" / "optimizer.safetensors" in files
    for file in files:
        name = file.relative_to(one)
        ours, theirs = load_file(file), load_file(other / name)
        assert ours.keys() == theirs.keys(), name
        for key, tensor in ours.items():
            same = tensor.numpy().tobytes() == theirs[key].numpy().tobytes()
            assert same, f"{name}: {key} differs"
    for name in ("final/config.json", "final/state/trainer.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert metrics_of(one) == metrics_of(other)


def check_kills(arguments: list[str], tmp_path: Path, kills: int, seed: int = 0) -> None:
    """Runs `arguments` undisturbed, then again under `kills` kills and resumes, and compares.

    A killed run that gets through to its end is compared and another one begun.
    """
    calm, log = tmp_path / "calm", tmp_path / "log"
    finish(start(["--version"], log), log)  # the server is up
    begin = time.monotonic()
    process = start([*arguments, "--out", str(calm)], log)
    while process.is_alive() and not (calm / "config.json").exists():
        time.sleep(0.001)
    ready = time.monotonic() - begin  # what comes before writes nothing
    finish(process, log)
    whole = time.monotonic() - begin
    assert is_complete(calm / "final")

    draw, runs = random.Random(seed), 0
    killed = tmp_path / "killed-0"
    while kills:
        process = start([*arguments, "--out", str(killed), "--resume"], log)
        process.join(draw.uniform(0.9 * ready, whole))
        if process.is_alive():
            process.kill()
            process.join()
            kills -= 1
        else:
            finish(process, log)
            assert_same_run(calm, killed)
            runs += 1
            killed = tmp_path / f"killed-{runs}"
    finish(start([*arguments, "--out", str(killed), "--resume"], log), log)
    assert_same_run(calm, killed)
