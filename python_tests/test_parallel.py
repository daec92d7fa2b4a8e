"""Several processes, started by torchrun: the steps that one process would take."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy_data
from safetensors.torch import load_file
from toy_data import read_metrics

from instructcore import parallel
from instructcore.cli import main
from instructcore.data import read_jsonl
from instructcore.errors import UserError
from instructcore.train import is_complete

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def python(processes: int) -> list[str]:
    """The beginning of a command line, up to the script or -m module."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else [])]


def run(processes: int, *arguments: str | Path) -> None:
    command = [*python(processes), *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    toy_data.write_text(path / "text.txt")
    toy_data.write_demonstrations(path / "demonstrations.jsonl")
    toy_data.write_comparisons(path / "comparisons.jsonl")
    toy_data.save_model(path / "model")
    return path


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> dict[int, Path]:
    """One step of every stage, by the number of processes."""
    found = {n: tmp_path_factory.mktemp(f"by_{n}") for n in (1, 2, 4)}
    for processes, out in found.items():
        run(processes, HERE / "parallel_stages.py", data, out)
    return found


def first_moments(run: Path) -> dict[str, torch.Tensor]:
    """After one step these are (1 − β1) times the gradients, of all models."""
    return {
        f"{path.stem}.{name}": tensor.double()
        for path in sorted((run / "final" / "state").glob("optimizer*"))
        for name, tensor in load_file(path).items()
        if name.endswith("exp_avg")
    }


def norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).norm())


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo", "ppo", "grpo"])
def test_gradients_and_losses_are_those_of_one_process(runs, stage, processes):
    one, several = first_moments(runs[1] / stage), first_moments(runs[processes] / stage)
    assert one.keys() == several.keys()
    difference = norm([one[name] - several[name] for name in one])
    assert difference <= 1e-5 * norm(list(one.values()))

    ours, theirs = (read_metrics(runs[n] / stage)[-1] for n in (1, processes))
    # GRPO's loss before its first update is 0: so are the advantages of a group, added up.
    scale = 1.0 if stage == "grpo" else abs(ours["loss"])
    assert abs(ours["loss"] - theirs["loss"]) <= 1e-6 * scale
    assert ours.keys() == theirs.keys()
    for name in {"val_loss", "accuracy", "rewards/margins", "ppo/entropy", "ptx/loss"} & {*ours}:
        assert theirs[name] == pytest.approx(ours[name], rel=2e-6), name


@pytest.mark.checklist(39)
@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_rollouts_are_the_same_bits(runs, stage):
    figures = [read_metrics(run / stage)[-1] for run in runs.values()]
    for name in ("objective/kl", "objective/entropy", "rollout/length", "rollout/eos_rate"):
        assert len({row[name] for row in figures}) == 1, name
    samples = [read_jsonl(run / stage / "samples.jsonl") for run in runs.values()]
    texts = [[row["response"] for row in rows if row["step"] == 0] for rows in samples]
    assert texts[0] and texts[0] == texts[1] == texts[2]


def pretrain(data: Path, out: Path, *flags: str) -> list[str]:
    shape = ("--context", "32", "--layers", "1", "--heads", "2", "--width", "16")
    flags = ("--tokenizer", "bytes", "--dtype", "float32", *shape, *flags)
    return ["pretrain", "--data", str(data / "text.txt"), *flags, "--out", str(out)]


def test_another_number_of_processes_resumes(data, tmp_path):
    arguments = pretrain(data, tmp_path / "run", "--steps", "6", "--save-every", "3")
    arguments += ["--log-every", "1"]
    run(2, "-m", "instructcore", *arguments)
    final = (tmp_path / "run" / "final").rename(tmp_path / "by_two")
    assert main([*arguments, "--resume"]) == 0
    by_two, then_one = (
        load_file(path / "model.safetensors") for path in (final, tmp_path / "run" / "final")
    )
    difference = norm([then_one[name] - tensor for name, tensor in by_two.items()])
    assert difference <= 1e-5 * norm(list(by_two.values()))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_saves_the_step_that_all_are_in(data, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    command = [*python(2), "-m", "instructcore"]
    command += pretrain(data, out, "--steps", "100000", "--save-every", "100000")
    with log.open("w") as file:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=file)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or not read_metrics(out):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60), log.read_text()
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert (
        is_complete(checkpoint) and f"stopped after step {checkpoint.name[5:]}" in log.read_text()
    )


def test_what_cannot_be_shared_is_refused(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "world", lambda: 3)
    with pytest.raises(UserError, match="--minibatch must be a multiple of the 3 processes, got 8"):
        parallel.micro_batch_size(0, 8, "minibatch")
    with pytest.raises(UserError, match="--micro-batch must divide the share .* got 2 and 3"):
        parallel.micro_batch_size(2, 9)
    assert parallel.micro_batch_size(0, 9) == 3 and parallel.micro_batch_size(1, 9) == 1
    assert parallel.chunks("abcd") == ["a", "b", "cd"] and parallel.chunks("a") == ["a"]
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    assert main(["eval", str(data / "model"), "--data", str(data / "demonstrations.jsonl")]) == 2
    assert "`eval` runs in one process" in capsys.readouterr().err


def test_a_mistake_is_told_once(data, tmp_path):
    (tmp_path / "final").mkdir()
    command = [*python(2), "-m", "instructcore", *pretrain(data, tmp_path, "--steps", "1")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode and done.stderr.count("already holds a run or a model") == 1
    assert "Connection closed" not in done.stderr


def test_gradients_are_summed_in_buckets(monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "BUCKET", 5)
    seen = []

    def all_reduce(x: torch.Tensor) -> None:
        seen.append(len(x))
        x *= 2

    monkeypatch.setattr(parallel.dist, "all_reduce", all_reduce)
    gradients = [torch.randn(2, 2).t(), torch.randn(3), torch.randn(()), torch.randn(2, 1)]
    before = [gradient.clone() for gradient in gradients]
    parallel.sum_gradients(gradients)
    assert all(torch.equal(g, 2 * b) for g, b in zip(gradients, before, strict=True))
    assert len(seen) > 1 and sum(seen) == 10
