"""What all stages share: schedule, optimiser, checkpoints, the run's directory, the loop."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from dataclasses import dataclass

import pytest
import torch

from instructcore.config import OptimConfig, RunConfig, group, option
from instructcore.errors import UserError
from instructcore.model import GPT, ModelConfig
from instructcore.tokenizer import Tokenizer
from instructcore.train import (
    AdamW,
    Run,
    TrainState,
    is_complete,
    learning_rate,
    mix,
    newest_checkpoint,
    optimise,
    resolve_checkpoint,
    update,
)


@dataclass(frozen=True)
class ToyConfig:
    data: tuple[str, ...] = option((), "nothing")
    optim: OptimConfig = group(OptimConfig, lr=1e-2)
    run: RunConfig = group(RunConfig, log_every=1, save_every=2)


def make_state(seed=0):
    config = ModelConfig(vocab_size=259, context=8, layers=1, heads=1, width=8)
    model = GPT(config, generator=torch.Generator().manual_seed(seed))
    return TrainState({"": model}, {"": AdamW(model, OptimConfig())}, Tokenizer.bytes())


def toy_config(out, **settings):
    run = {"out": str(out), "log_every": 1, "save_every": 2, "dtype": "float32"} | settings
    return ToyConfig(run=RunConfig(**run))


def run_toy(out, steps=7, step_hook=None, config=None, **settings):
    """Pulls the weights towards noise, which depends on torch's generator and the step alone."""
    config = config or toy_config(out, **settings)
    run = Run.open("toy", config)
    if run.finished:
        return run
    state = make_state()
    run.start(state, steps)

    def step(index):
        loss = sum(((p - torch.randn_like(p)) ** 2).mean() for p in state.models[""].parameters())
        if step_hook is not None:
            loss = step_hook(index, loss)
        return optimise(state.optimizers[""], config.optim, index, steps, [loss]) | {"tokens": 5}

    run.loop(step, evaluate=lambda: {"val_loss": 1.5})
    run.finish()
    return run


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_checkpoint(one, other):
    for file in one.rglob("*.safetensors"):
        assert file.read_bytes() == (other / file.relative_to(one)).read_bytes(), file
    return True


@pytest.mark.checklist(26)
def test_learning_rate_known_values():
    optim = OptimConfig(lr=2.0, warmup=4, warmup_from=0.5, min_lr_ratio=0.25)
    rates = [learning_rate(optim, step, 12) for step in range(12)]
    # Up from half: 1 + 1 * step / 4; then cosine from 2 to 0.5 over 8 steps, 1.25 in the middle.
    assert rates[:5] == [1.0, 1.25, 1.5, 1.75, 2.0]
    assert rates[8] == pytest.approx(1.25)
    assert rates[6] == pytest.approx(0.5 + 1.5 * (1 + math.sqrt(0.5)) / 2)
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))
    linear = OptimConfig(lr=2.0, warmup=0.25, schedule="linear", min_lr_ratio=0.0)
    assert learning_rate(linear, 4, 8) == pytest.approx(2.0 * (1 - 2 / 6))  # W = 0.25 * 8 = 2
    constant = OptimConfig(lr=2.0, schedule="constant")
    assert {learning_rate(constant, step, 9) for step in range(9)} == {2.0}


@pytest.mark.checklist(39)
def test_mix_depends_on_every_number():
    seeds = {mix(a, b) for a in range(-5, 30) for b in range(-5, 30)}
    assert len(seeds) == 35 * 35 and all(0 <= seed < 1 << 63 for seed in seeds)
    assert mix(1, 2) != mix(2, 1)


class Toy(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.vector = torch.nn.Parameter(torch.tensor(value))
        self.matrix = torch.nn.Parameter(torch.ones(2, 2))


class Recorder(AdamW):
    """Moves by plain gradient descent, so that the effect of a clip can be read off."""

    @torch.no_grad()
    def step(self, lr):
        for p in self.parameters.values():
            if p.grad is not None:
                p -= lr * p.grad


def test_adamw_is_torchs():
    """Against torch.optim.AdamW, with and without a gradient for some of the parameters."""
    ours, theirs = Toy([3.0, 4.0]), Toy([3.0, 4.0])
    optim = OptimConfig(beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.3)
    optimizer = AdamW(ours, optim)
    reference = torch.optim.AdamW(
        [{"params": [theirs.vector], "weight_decay": 0.0}, {"params": [theirs.matrix]}],
        betas=(0.8, 0.9),
        eps=1e-3,
        weight_decay=0.3,
    )
    for step in range(4):
        for model in (ours, theirs):
            model.vector.grad = torch.tensor([1.0, -2.0]) * (step + 1)
            model.matrix.grad = torch.full((2, 2), 0.5) if step % 2 else None
        optimizer.step(0.1 / (step + 1))
        for g in reference.param_groups:
            g["lr"] = 0.1 / (step + 1)
        reference.step()
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert optimizer.tensors()["matrix|step"] == 2 and optimizer.tensors()["vector|step"] == 4


def test_weight_decay_is_for_matrices():
    toy = Toy([3.0, 4.0])
    optimizer = AdamW(toy, OptimConfig(weight_decay=0.5))
    toy.vector.grad, toy.matrix.grad = torch.zeros(2), torch.zeros(2, 2)
    optimizer.step(0.1)
    assert toy.vector.tolist() == [3.0, 4.0]
    torch.testing.assert_close(toy.matrix.data, torch.full((2, 2), 0.95))


@pytest.mark.checklist(41)
def test_update_clips_and_steps():
    toy = Toy([3.0, 4.0])
    optimizer = Recorder(toy, OptimConfig())
    toy.vector.grad = torch.tensor([30.0, 40.0])
    assert update(optimizer, 0.5, 1.0) == 50.0  # the norm before the clip
    torch.testing.assert_close(toy.vector.data, torch.tensor([3.0 - 0.5 * 0.6, 4.0 - 0.5 * 0.8]))
    assert toy.vector.grad is None
    toy.vector.grad = torch.tensor([3.0, 4.0])
    assert update(optimizer, 0.1, 0.0) == 5.0  # 0: no clip
    torch.testing.assert_close(toy.vector.data, torch.tensor([2.7 - 0.3, 3.6 - 0.4]))


@pytest.mark.checklist(19)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_update_skips_a_gradient_that_is_not_finite(bad):
    state = make_state()
    model, optimizer = state.models[""], state.optimizers[""]
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    next(model.parameters()).grad[0, 0] = bad
    assert not math.isfinite(update(optimizer, 1.0, 1.0))
    assert all(map(torch.equal, before, model.parameters()))
    assert not any(tensor.any() for tensor in optimizer.tensors().values())  # nor its memory
    assert all(p.grad is None for p in model.parameters())


def test_micro_batches_add_up():
    toy = Toy(2.0)
    optim = OptimConfig(lr=1.0, grad_clip=0.0)
    optimizer = Recorder(toy, optim)
    metrics = optimise(optimizer, optim, 0, 1, [toy.vector * 0.25, toy.vector * 0.5])
    assert metrics == {"loss": 1.5, "grad_norm": 0.75, "lr": 1.0}
    assert toy.vector.item() == 2.0 - 0.75


@pytest.mark.checklist(40)
@pytest.mark.bug("NeMo-RL#3171")
def test_checkpoint_round_trip(tmp_path):
    state = make_state()
    state.extra, state.tensors = {"kl_coef": 0.1}, {"ema": torch.randn(3)}
    for p in state.models[""].parameters():
        p.grad = torch.randn_like(p)
    update(state.optimizers[""], 1e-2, 1.0)
    state.save(tmp_path / "one", "toy", 3, 9)
    other = make_state(seed=1)
    other.tensors = {"ema": torch.zeros(3)}
    assert other.load(tmp_path / "one")["step"] == 3
    assert other.extra == {"kl_coef": 0.1}
    assert torch.equal(other.tensors["ema"], state.tensors["ema"])
    other.save(tmp_path / "two", "toy", 3, 9)
    assert same_checkpoint(tmp_path / "one", tmp_path / "two")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]  # nothing temporary


def test_a_run_leaves_what_it_should(tmp_path):
    out = tmp_path / "run"
    run_toy(out)
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert lines[-1]["val_loss"] == 1.5 and "val_loss" not in lines[0]
    assert {"loss", "lr", "grad_norm", "seconds", "tokens_per_second"} <= lines[0].keys()
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-4", "step-6"]
    assert is_complete(out / "final")
    saved = json.loads((out / "config.json").read_text())
    assert saved["stage"] == "toy" and saved["settings"]["device"] in ("cpu", "cuda")
    assert list((out / "tensorboard").iterdir())
    assert json.loads((out / "final" / "config.json").read_text())["instructcore"]["stage"] == "toy"


def test_ctrl_c_saves_and_resume_repeats_the_bits(tmp_path, capsys):
    run_toy(tmp_path / "calm")

    def interrupt(index, loss):
        if index == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 7 .*--resume"):
        run_toy(tmp_path / "run", step_hook=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert newest_checkpoint(tmp_path / "run").name == "step-3"
    run_toy(tmp_path / "run", resume=True)
    assert same_checkpoint(tmp_path / "calm" / "final", tmp_path / "run" / "final")
    clock = ("seconds", "tokens_per_second")
    ours, theirs = (
        [{k: v for k, v in line.items() if k not in clock} for line in metrics(tmp_path / name)]
        for name in ("calm", "run")
    )
    assert ours == theirs
    capsys.readouterr()
    assert run_toy(tmp_path / "run", resume=True).finished
    assert "nothing to resume" in capsys.readouterr().out


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    def poison(index, loss):
        return loss * math.nan if index == 4 else loss

    with pytest.raises(UserError, match="loss is nan at step 5.*step-4"):
        run_toy(tmp_path / "run", step_hook=poison)
    newest = newest_checkpoint(tmp_path / "run")
    assert newest.name == "step-4" and is_complete(newest)
    assert not (tmp_path / "run" / "final").exists()


def test_skipped_steps_are_counted_and_resumed(tmp_path):
    def spoil(index, loss):  # a finite loss with an infinite gradient
        return loss + (torch.sqrt(loss.detach() * 0 + (loss - loss.detach())) if index == 1 else 0)

    def stop(index, loss):
        if index == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return spoil(index, loss)

    with pytest.raises(KeyboardInterrupt, match="after step 3"):
        run_toy(tmp_path / "run", step_hook=stop)
    lines = metrics(tmp_path / "run")
    assert lines[1]["grad_norm"] is None and lines[-1]["skipped_steps"] == 1
    assert "skipped_steps" not in lines[0]

    def spoil_again(index, loss):
        return spoil(1 if index == 4 else 0, loss)

    run_toy(tmp_path / "run", resume=True, step_hook=spoil_again)
    assert [line.get("skipped_steps", 0) for line in metrics(tmp_path / "run")] == [
        0, 1, 1, 1, 2, 2, 2
    ]  # fmt: skip
    trainer = json.loads((tmp_path / "run" / "final" / "state" / "trainer.json").read_text())
    assert trainer["extra"]["skipped_steps"] == 2


def test_incomplete_checkpoints_are_never_picked(tmp_path):
    run_toy(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (tmp_path / "run" / "final" / "state" / "trainer.json").unlink()
    weights = folder / "step-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (folder / "step-9").mkdir()
    (folder / ".step-8.1.tmp").mkdir()
    assert newest_checkpoint(tmp_path / "run") == folder / "step-4"
    run_toy(tmp_path / "run", resume=True)
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "final"
    assert not (folder / ".step-8.1.tmp").exists()


@pytest.mark.parametrize("traces", [(), ("tokens",), ("config.json",), ("metrics.jsonl",)])
def test_killed_before_the_first_checkpoint_begins_anew(tmp_path, traces):
    """--resume serves from the first moment on: what a kill can leave is no obstacle."""
    run_toy(tmp_path / "calm")
    out = tmp_path / "run"
    if traces:
        (out / "tokens").mkdir(parents=True)
    if "tokens" not in traces and traces:
        text = (tmp_path / "calm" / "config.json").read_text()
        (out / "config.json").write_text(text)
    if "metrics.jsonl" in traces:
        (out / "checkpoints" / ".step-2.1.tmp" / "state").mkdir(parents=True)
        (out / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    run_toy(out, resume=True)
    assert same_checkpoint(tmp_path / "calm" / "final", out / "final")
    assert [line["step"] for line in metrics(out)] == list(range(1, 8))
    assert not list((out / "checkpoints").glob(".*"))


def test_metrics_are_cut_to_the_checkpoint(tmp_path):
    run_toy(tmp_path / "run")
    whole = metrics(tmp_path / "run")
    (tmp_path / "run" / "final" / "state" / "trainer.json").unlink()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # cut short by a kill
    run_toy(tmp_path / "run", resume=True)  # from step 6
    again = metrics(tmp_path / "run")
    assert again[:6] == whole[:6]  # the very lines, clock and all
    assert [line["loss"] for line in again] == [line["loss"] for line in whole]


def test_refuses_a_directory_in_use(tmp_path):
    run_toy(tmp_path / "run", steps=2)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(UserError, match="already holds a run"):
        run_toy(tmp_path / "run")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a directory"):
        run_toy(tmp_path / "file")
    with pytest.raises(UserError, match="--out is missing"):
        run_toy("", config=ToyConfig())
    assert before == {p: p.stat().st_mtime_ns for p in before}
    # A checkpoint that is no run of ours cannot be resumed into.
    make_state().models[""].save(tmp_path / "model")
    with pytest.raises(UserError, match="no run to resume"):
        run_toy(tmp_path / "model", resume=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed was 0 .* is 1 now"),
        ({"dtype": "bfloat16"}, "dtype was float32 .* is bfloat16"),
    ],
)
def test_resume_with_another_setting_is_named(tmp_path, change, named):
    run_toy(tmp_path / "run")
    with pytest.raises(UserError, match=named):
        run_toy(tmp_path / "run", resume=True, **change)


def test_resume_may_change_how_often_it_writes(tmp_path):
    def stop(index, loss):
        os.kill(os.getpid(), signal.SIGINT)
        return loss

    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "run", step_hook=stop)
    often = {"log_every": 3, "save_every": 0, "keep": 1}
    run_toy(tmp_path / "run", resume=True, **often)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 3, 6, 7]
    with pytest.raises(UserError, match="holds a run of `toy`, not of `sft`"):
        Run.open("sft", toy_config(tmp_path / "run", resume=True))


def test_other_data_on_resume_is_noticed(tmp_path):
    def stop(index, loss):
        os.kill(os.getpid(), signal.SIGINT)
        return loss

    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "run", step_hook=stop)
    with pytest.raises(UserError, match="other data: 9 steps, 7 before"):
        run_toy(tmp_path / "run", steps=9, resume=True)


def test_resolve_checkpoint(tmp_path):
    run_toy(tmp_path / "quickstart" / "ppo", steps=3)
    final = tmp_path / "quickstart" / "ppo" / "final"
    for path in (final, tmp_path / "quickstart" / "ppo", tmp_path / "quickstart"):
        assert resolve_checkpoint(path) == final
    (final / "state" / "trainer.json").unlink()
    assert resolve_checkpoint(tmp_path / "quickstart").name == "step-2"
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="no checkpoint at"):
            resolve_checkpoint(path)
    with pytest.raises(UserError, match="no checkpoint at"):
        resolve_checkpoint(tmp_path / "quickstart", "sft")


def test_tensorboard_missing_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run_toy(tmp_path / "run", steps=2)
    said = [line for line in capsys.readouterr().out.splitlines() if "tensorboard is not" in line]
    assert len(said) == 1 and is_complete(tmp_path / "run" / "final")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, r"--lr must be in \(0, inf\), got 0.0"),
        ({"lr": math.nan}, r"--lr must be in \(0, inf\), got nan"),
        ({"schedule": "step"}, "--schedule must be one of cosine, linear, constant, got 'step'"),
        ({"beta2": 1.0}, r"--beta2 must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        OptimConfig(**settings)
