"""What every stage shares: optimiser, schedule, step loop, metrics, checkpoints, exact resume.

A run is a directory: config.json, metrics.jsonl, checkpoints/step-N/, final/, tensorboard/. A
checkpoint is a Hugging Face directory plus state/ (optimisers, counters), written beside its place
and renamed, so it is there whole or not at all. All randomness of step s is a function of
(seed, s): the position in the data and in the random streams IS the step number, and a resumed run
repeats the same bits.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from . import __version__, parallel
from .config import OptimConfig, RunConfig, check, check_writable, flatten
from .data import read_jsonl
from .errors import UserError
from .model import GPT, load
from .tokenizer import Tokenizer

Metrics = dict[str, Any]  # of a step: floats or 0-d tensors, read only where they are logged

WALL_CLOCK = ("seconds", "tokens_per_second")  # the only metrics that differ from run to run
MAY_CHANGE = ("out", "resume", "save_every", "keep", "log_every")  # on --resume
REDRAW_PERIOD, LINE_PERIOD = 0.2, 10.0  # seconds: progress on a terminal, and elsewhere


# ---- Randomness, schedule, optimiser


def mix(*numbers: int) -> int:
    """A seed from numbers such as (seed, step): splitmix64 over each in turn, 63 bits."""
    mask = (1 << 64) - 1
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """The rate of step `step` in [0, steps): a linear warm-up, then the schedule.

    Warm-up over W steps: lr · (f + (1 − f) · step / W), f = warmup_from. Then, with p rising from 0
    at step W to 1 at `steps` and m = min_lr_ratio, cosine is lr · (m + (1 − m) · (1 + cos πp) / 2)
    and linear is lr · (m + (1 − m) · (1 − p)).
    """
    warmup = optim.warmup if optim.warmup >= 1 else optim.warmup * steps
    if step < warmup:
        return optim.lr * (optim.warmup_from + (1 - optim.warmup_from) * step / warmup)
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - warmup) / max(1.0, steps - warmup)
    left = (1 + math.cos(math.pi * progress)) / 2 if optim.schedule == "cosine" else 1 - progress
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * left)


class AdamW:
    """AdamW over the parameters of a model that need a gradient; decay on matrices alone.

    m ← β1 m + (1 − β1) g,  v ← β2 v + (1 − β2) g²,  p ← (1 − lr · decay) p − lr · m̂ / (√v̂ + eps)
    (Loshchilov & Hutter 2019). It is torch's fused function; torch's Optimizer class would import
    the compiler, which takes longer than many a small run.
    """

    KINDS = ("exp_avg", "exp_avg_sq", "step")

    def __init__(self, model: nn.Module, optim: OptimConfig) -> None:
        self.optim = optim
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.state = {
            name: (torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=p.device))
            for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Moves the parameters that have a gradient."""
        optim = self.optim
        for is_matrix in (True, False):
            rows = [
                (p, p.grad, *self.state[name])
                for name, p in self.parameters.items()
                if p.grad is not None and (p.ndim >= 2) == is_matrix
            ]
            if rows:
                parameters, grads, means, squares, steps = map(list, zip(*rows, strict=True))
                decay = optim.weight_decay if is_matrix else 0.0
                settings = dict(beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps)
                settings |= dict(fused=True, amsgrad=False, maximize=False)
                tensors = (parameters, grads, means, squares, [], steps)
                adamw(*tensors, lr=lr, weight_decay=decay, **settings)
                # The fused function does not, but what has copies of weights goes by it.
                torch.autograd.graph.increment_version(parameters)

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            p.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """What it remembers, by parameter and kind: "blocks.0.qkv|exp_avg"."""
        return {
            f"{name}|{kind}": tensor
            for name, row in self.state.items()
            for kind, tensor in zip(self.KINDS, row, strict=True)
        }


def update(optimizer: AdamW, lr: float, grad_clip: float) -> float:
    """One optimiser step from the gradients at hand, which it clips first and clears after.

    The gradients are the sums of those at hand in all processes. Returns their norm before the
    clip. Where it is not finite, nothing but the gradients changes: the step is skipped. Reading
    the norm is the one wait for the device in a step.
    """
    parameters = [p for p in optimizer.parameters.values() if p.grad is not None]
    parallel.sum_gradients([p.grad for p in parameters])
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    norm = float(total)
    if math.isfinite(norm):
        if grad_clip and norm > grad_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, total)
        optimizer.step(lr)
    optimizer.zero_grad()
    return norm


def optimise(
    optimizer: AdamW, optim: OptimConfig, step: int, steps: int, losses: Iterable[Tensor]
) -> Metrics:
    """A whole step: the gradients of `losses`, one per micro-batch, are summed, then applied.

    The losses are this process's, at least one; the loss returned is that of all.
    """
    loss = sum(_backward(part) for part in losses)
    lr = learning_rate(optim, step, steps)
    norm = update(optimizer, lr, optim.grad_clip)
    return {"loss": float(parallel.total(loss)), "grad_norm": norm, "lr": lr}


def _backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def choose_device(name: str) -> torch.device:
    """The device of `--device`: auto is a GPU if there is one and the kernels to use it."""
    from . import _C

    kernels = {"attention", "cross_entropy", "sample"} <= set(_C.build_info()["cuda_ops"])
    if name == "auto":
        return torch.device("cuda" if kernels and torch.cuda.is_available() else "cpu")
    if name == "cuda":
        check(kernels, "--device cuda: this build has no CUDA kernels")
        check(torch.cuda.is_available(), "--device cuda: torch finds no CUDA device")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype of `--dtype`: auto is bfloat16 where the device multiplies it fast."""
    if name != "auto":
        return getattr(torch, name)
    from . import _C

    fast = device.type == "cuda" or _C.build_info()["bfloat16_dot"]
    return torch.bfloat16 if fast else torch.float32


# ---- Checkpoints


def load_checkpoint(path: str, device: str, dtype: str) -> tuple[GPT, Tokenizer]:
    """What a command computes with, by its settings --device and --dtype."""
    where, found = choose_device(device), resolve_checkpoint(path)
    return load(found, dtype=choose_dtype(dtype, where), device=where), Tokenizer.load(found)


@dataclass
class TrainState:
    """Everything that a checkpoint holds.

    `models` by subfolder: "" is the one at the checkpoint's root, which is served; `optimizers`
    have the names of their models. `tensors` and `extra` (JSON) are whatever else a stage must
    remember.
    """

    models: dict[str, GPT]
    optimizers: dict[str, AdamW]
    tokenizer: Tokenizer
    tensors: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def save(self, directory: str | Path, stage: str, step: int, steps: int) -> None:
        """Writes the checkpoint atomically, replacing one of that name; all processes wait."""
        parallel.first(lambda: self._write(Path(directory), stage, step, steps))

    def _write(self, directory: Path, stage: str, step: int, steps: int) -> None:
        from safetensors.torch import save_file

        temporary = _temporary(directory)
        state = temporary / "state"
        state.mkdir(parents=True)
        for name, model in self.models.items():
            model.save(temporary / name, tokenizer=self.tokenizer, extra={"stage": stage})
        for name, tensors in self._state_tensors().items():
            save_file(tensors, state / f"{name}.safetensors")
        files = {str(f.relative_to(temporary)): f.stat().st_size for f in _files(temporary)}
        trainer = dict(stage=stage, step=step, steps=steps, extra=self.extra, files=files)
        (state / "trainer.json").write_text(json.dumps(trainer, indent=1), encoding="utf-8")
        for path in (*_files(temporary), state, temporary):
            _sync(path)
        if directory.exists():
            _remove(directory)
        temporary.rename(directory)
        _sync(directory.parent)

    def load(self, directory: str | Path) -> dict[str, Any]:
        """Restores a checkpoint in place; returns its trainer.json."""
        from safetensors.torch import load_file

        directory = Path(directory)
        state = directory / "state"
        for name, model in self.models.items():
            model.load_state_dict(load(directory / name).state_dict())
        for name, optimizer in self.optimizers.items():
            tensors = load_file(state / f"{_optimizer_file(name)}.safetensors")
            for key, tensor in optimizer.tensors().items():
                tensor.copy_(tensors[key])
        if self.tensors:
            for name, tensor in load_file(state / "tensors.safetensors").items():
                self.tensors[name].copy_(tensor)
        trainer = json.loads((state / "trainer.json").read_text(encoding="utf-8"))
        self.extra.update(trainer["extra"])
        return trainer

    def _state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors under state/, by file."""
        files = {
            _optimizer_file(name): optimizer.tensors()
            for name, optimizer in self.optimizers.items()
        }
        if self.tensors:
            files["tensors"] = {k: v.detach().contiguous() for k, v in self.tensors.items()}
        return files


def _optimizer_file(name: str) -> str:
    return f"optimizer-{name}" if name else "optimizer"


def _files(directory: Path) -> list[Path]:
    return sorted(f for f in directory.rglob("*") if f.is_file())


def _sync(path: Path) -> None:
    """Waits until a file, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _temporary(path: Path) -> Path:
    """A free name beside `path`; `Run.start` clears away those that a kill left behind."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    temporary = _temporary(path)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _remove(directory: Path) -> None:
    """Removes a checkpoint, under another name first: half of one is never seen as one."""
    shutil.rmtree(directory.rename(_temporary(directory.with_name(f"{directory.name}.old"))))


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no such file or it is cut short."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def is_complete(checkpoint: Path) -> bool:
    """Whether a directory holds a checkpoint of ours with all its files at their full length."""
    files = _read_json(checkpoint / "state" / "trainer.json").get("files", {})
    paths = {checkpoint / name: size for name, size in files.items()}
    return bool(files) and all(p.is_file() and p.stat().st_size == s for p, s in paths.items())


def newest_checkpoint(run: str | Path) -> Path | None:
    """The newest complete checkpoint in a run's directory: final/, else the highest step."""
    run = Path(run)
    return next((p for p in (run / "final", *checkpoints_of(run)[::-1]) if is_complete(p)), None)


def last_metric(run: Path, name: str) -> float:
    """The newest value of a metric in a run's metrics.jsonl."""
    return next(row[name] for row in reversed(read_jsonl(run / "metrics.jsonl")) if name in row)


def checkpoints_of(run: Path) -> list[Path]:
    """checkpoints/step-N in the order of N."""
    paths = [p for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return sorted(paths, key=lambda p: int(p.name[5:]))


def resolve_checkpoint(path: str | Path, stage: str = "ppo") -> Path:
    """The checkpoint meant by a path: itself, a run's newest, or that of a quickstart's `stage`."""
    path = Path(path)
    check(path.exists(), f"no checkpoint at {path}: there is no such directory")
    if not (path / "config.json").exists() and (path / stage).is_dir():
        path = path / stage
    settings = _read_json(path / "config.json")
    if settings and "settings" not in settings:
        return path  # a Hugging Face directory
    newest = newest_checkpoint(path)
    if newest is None:
        raise UserError(f"no checkpoint at {path}: neither a model's config.json nor a run's save")
    return newest


# ---- The run


class Run:
    """A run's directory and its loop. Use: open, then start, loop, finish."""

    def __init__(self, stage: str, config: Any) -> None:
        self.stage, self.directory = stage, Path(config.run.out)
        self.device = choose_device(config.run.device)
        self.dtype = choose_dtype(config.run.dtype, self.device)
        parallel.begin(self.device)
        chosen = {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}
        self.config: RunConfig = replace(config.run, **chosen)
        self.settings = flatten(replace(config, run=self.config))
        self.final = self.directory / "final"
        self.step, self.steps, self.finished, self.stopped = 0, 0, False, False
        self._metrics: TextIO | None = None  # of the first process alone, as is what follows
        self._tensorboard: Any = None

    @classmethod
    def open(cls, stage: str, config: Any) -> Run:
        """Looks at the run's directory before any work; refuses one in use, or other settings.

        `config` is the stage's dataclass, with a RunConfig under `run`. `finished` is true
        afterwards where a resumed run has nothing left to do.
        """
        check(bool(config.run.out), "--out is missing: the directory of the run")
        run = cls(stage, config)
        run.finished = parallel.first(run._is_finished)
        return run

    def _is_finished(self) -> bool:
        out = self.directory
        check(not out.exists() or out.is_dir(), f"--out {out} is not a directory")
        traces = ("config.json", "metrics.jsonl", "checkpoints", "final", "model.safetensors")
        if not any((out / name).exists() for name in traces):
            check_writable(self.config.out)
            return False
        check(
            self.config.resume,
            f"{out} already holds a run or a model: add --resume to go on with a run, "
            "or choose another --out",
        )
        self._compare_settings()
        finished = is_complete(self.final)
        if finished:
            print(f"{out}: the run is finished, nothing to resume; its model is {self.final}")
        return finished

    def _compare_settings(self) -> None:
        out, saved = self.directory, _read_json(self.directory / "config.json")
        check("settings" in saved, f"{out} holds no run to resume: its config.json is not a run's")
        stage, before = saved["stage"], saved["settings"]
        check(stage == self.stage, f"{out} holds a run of `{stage}`, not of `{self.stage}`")
        for name, now in self.settings.items():
            same = name in MAY_CHANGE or before.get(name) == now
            change = f"{name} was {before.get(name)} in {out} and is {now} now"
            check(same, f"--resume goes on with the same settings: {change}")

    def start(self, state: TrainState, steps: int) -> None:
        """Begins the run of `steps` steps, or restores its newest complete checkpoint."""
        self.state, self.steps = state, steps
        newest = None
        if self.config.resume:
            newest = parallel.first(lambda: newest_checkpoint(self.directory))
        if newest is not None:
            trainer = state.load(newest)
            self.step, before = trainer["step"], trainer["steps"]
            check(before == steps, f"--resume with other data: {steps} steps, {before} before")
        parallel.first(lambda: self._open_files(newest))

    def _open_files(self, newest: Path | None) -> None:
        checkpoints, metrics = self.directory / "checkpoints", self.directory / "metrics.jsonl"
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in (*self.directory.glob(".*.tmp"), *checkpoints.glob(".*.tmp")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        versions = {"instructcore": __version__, "torch": torch.__version__}
        record = {"stage": self.stage, "settings": self.settings, "versions": versions}
        text = json.dumps(record, indent=1, ensure_ascii=False)
        write_whole(self.directory / "config.json", text)  # the first trace of a run
        checkpoints.mkdir(exist_ok=True)
        _truncate_metrics(metrics, self.step if newest is not None else -1)
        self._metrics = metrics.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard(self.directory / "tensorboard", self.step)
        self._print_beginning(newest)

    def _print_beginning(self, newest: Path | None) -> None:
        given = {k: v for k, v in self.settings.items() if v not in ("", None, [])}
        shown = " ".join(f"{name}={_plain(value)}" for name, value in given.items())
        width = shutil.get_terminal_size().columns
        whole = {"break_long_words": False, "break_on_hyphens": False}  # paths stay in one piece
        print(textwrap.fill(f"{self.stage}: {shown}", width, subsequent_indent="  ", **whole))
        sizes = ", ".join(
            f"{name or 'model'} of {model.num_parameters():,} parameters"
            for name, model in self.state.models.items()
        )
        origin = f", from {newest}" if newest is not None else ""
        print(f"{self.stage}: {sizes}; steps {self.step} to {self.steps}{origin}", flush=True)

    def loop(
        self,
        step_fn: Callable[[int], Metrics],
        *,
        evaluate: Callable[[], Metrics] | None = None,
        eval_every: int = 0,
        eval_first: bool = False,
        show: tuple[str, ...] = (),
    ) -> None:
        """Runs the steps left. `step_fn(s)` does step s in [0, steps) and returns its metrics.

        `loss` must be finite, a `grad_norm` that is not counts as a skipped step, `tokens` gives
        the speed; the metrics named in `show` join the progress line. `evaluate` runs after the
        last step, every `eval_every` steps and, if `eval_first`, before the first. Ctrl-C lets the
        step finish, saves, and raises KeyboardInterrupt.
        """
        config = self.config
        progress = _Progress(self.stage, self.step, self.steps, ("loss", *show))
        own = (parallel.rank(),) if parallel.rank() else ()  # each process draws its own dropout
        with contextlib.closing(self), _interrupts() as interrupted, progress:
            if evaluate is not None and eval_first and self.step == 0:
                progress.announce(self._log(0, evaluate()))
            while self.step < self.steps and not self.stopped:
                torch.manual_seed(mix(config.seed, self.step, *own))
                metrics = step_fn(self.step)
                self._check(metrics)
                self.step += 1
                progress.tokens += metrics.pop("tokens", 0)
                last = self.step == self.steps or self.stopped
                evaluated = evaluate is not None and (
                    last or (eval_every > 0 and self.step % eval_every == 0)
                )
                if evaluated or last or self.step % config.log_every == 0:
                    metrics |= progress.clock()
                    found = evaluate() if evaluated else {}
                    progress.record = self._log(self.step, metrics | found)
                    progress.restart_clock()
                progress.update(self.step)
                if evaluated:
                    progress.announce({k: progress.record[k] for k in ("step", *found)})
                due = config.save_every and self.step % config.save_every == 0
                # After the last comes final/, but what a stopped run was at is kept too.
                interrupt = parallel.any_of(interrupted.is_set())
                if interrupt or self.stopped or (due and not last):
                    self._save()
                if interrupt:
                    raise KeyboardInterrupt(
                        f"stopped after step {self.step} of {self.steps} and saved; the same "
                        "command with --resume goes on from there"
                    )

    def stop(self) -> None:
        """Ends the loop after the step that it is in, with a checkpoint of that step."""
        self.stopped = True

    def finish(self) -> Path:
        """Writes final/, the last act of a run, and returns its path."""
        self.state.save(self.final, self.stage, self.step, self.steps)
        print(f"{self.stage}: wrote {self.final}", flush=True)
        return self.final

    def close(self) -> None:
        """Ends the metrics; `loop` does so when it ends, however it ends."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
            self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _check(self, metrics: Metrics) -> None:
        """Stops at a loss that is not finite; counts a step that `update` skipped."""
        loss = float(metrics.get("loss", 0.0))
        if not math.isfinite(loss):
            newest = newest_checkpoint(self.directory)
            kept = f"the last good checkpoint is {newest}" if newest else "no checkpoint is written"
            raise UserError(
                f"the loss is {loss} at step {self.step + 1}, so the run stops; {kept}. "
                "A lower --lr or a longer --warmup may help"
            )
        skipped = self.state.extra.get("skipped_steps", 0)
        skipped += not math.isfinite(metrics.get("grad_norm", 0.0))
        if skipped:
            self.state.extra["skipped_steps"] = metrics["skipped_steps"] = skipped

    def _log(self, step: int, metrics: Metrics) -> Metrics:
        """Writes one line of metrics; returns it with plain numbers."""
        record: Metrics = {"step": step}
        for name, value in metrics.items():
            value = value.item() if isinstance(value, Tensor) else value
            finite = not isinstance(value, float) or math.isfinite(value)
            record[name] = value if finite else None  # JSON has no NaN
            if self._tensorboard is not None and finite:
                tag = name if "/" in name else f"{self.stage}/{name}"
                self._tensorboard.add_scalar(tag, value, step)
        if self._metrics is not None:
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
        return record

    def _save(self) -> None:
        """Writes checkpoints/step-N, then drops the oldest beyond `keep`."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
        path = self.directory / "checkpoints" / f"step-{self.step}"
        self.state.save(path, self.stage, self.step, self.steps)
        parallel.first(self._drop_old)

    def _drop_old(self) -> None:
        for old in checkpoints_of(self.directory)[: -self.config.keep]:
            _remove(old)


def _truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines after `step`, and one that a kill cut short."""
    if not path.exists():
        return
    keep = 0
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            keep += len(line)
    os.truncate(path, keep)


def _tensorboard(directory: Path, step: int) -> Any:
    """A writer of TensorBoard events, None (and a line that says so) where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("tensorboard is not installed: no events; metrics.jsonl holds the same figures")
        return None
    return SummaryWriter(str(directory), purge_step=step + 1)


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event; the second one stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return

    def handle(signum: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt("stopped without saving")
        event.set()
        print("\nCtrl-C: saving after this step (again: stop at once)", file=sys.stderr, flush=True)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


class _Progress:
    """The progress line: redrawn in place on a terminal, a plain line now and then elsewhere."""

    def __init__(self, title: str, step: int, steps: int, show: tuple[str, ...]) -> None:
        self.title, self.first, self.steps, self.show = title, step, steps, show
        self.begin, self.drawn = time.perf_counter(), -math.inf
        self.record: Metrics = {}  # the newest metrics
        self.bar: Any = None
        self.restart_clock()

    def __enter__(self) -> _Progress:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn(self.title), BarColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, auto_refresh=False)
            self.task = self.bar.add_task("", total=self.steps, completed=self.first)
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def restart_clock(self) -> None:
        self.since, self.tokens = time.perf_counter(), 0

    def clock(self) -> Metrics:
        """Seconds from the beginning, and the speed since `restart_clock`."""
        now = time.perf_counter()
        speed = {"tokens_per_second": self.tokens / (now - self.since)} if self.tokens else {}
        return {"seconds": now - self.begin, **speed}

    def update(self, step: int) -> None:
        now, period = time.perf_counter(), LINE_PERIOD if self.bar is None else REDRAW_PERIOD
        if not self.record or (now - self.drawn < period and step < self.steps):
            return
        self.drawn = now
        figures = [f"{k} {_plain(self.record[k])}" for k in self.show if k in self.record]
        if "tokens_per_second" in self.record:
            figures.append(f"{self.record['tokens_per_second']:,.0f} tokens/s")
        left = int((now - self.begin) / (step - self.first) * (self.steps - step))
        text = "  ".join((f"{step}/{self.steps}", *figures, f"{left // 60}:{left % 60:02d} left"))
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=text, refresh=True)
        else:
            print(f"{self.title}: {text}", flush=True)

    def announce(self, record: Metrics) -> None:
        """A line that stays: what an evaluation found."""
        found = "  ".join(f"{k} {_plain(v)}" for k, v in record.items())
        print(f"{self.title}: {found}", flush=True)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
