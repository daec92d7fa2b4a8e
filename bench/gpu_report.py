"""All that a machine with a GPU can tell, in less than 8 minutes: `python bench/gpu_report.py`.

Builds and installs the package, runs the GPU's tests and the primitives' conformance test, a
training step against the CPU's, a short quickstart and every op's benchmark, which is recorded in
bench/results/<device>.csv. A part that fails or runs out of time is reported, and the rest goes on.
Exit status: 0 if all is well, 1 if not, 2 without a GPU. Needs nvcc and `pip install -e '.[dev]'`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

SECONDS = 470.0  # for everything
THIS = Path(__file__).resolve()
BENCH, ROOT = THIS.parent, THIS.parents[1]


class Part(NamedTuple):
    name: str
    command: list[str]
    shows: str = ""  # which lines of its output are told, a regular expression; else the last one


class Result(NamedTuple):
    name: str
    verdict: str
    seconds: float
    lines: list[str]


def python(*words: object) -> list[str]:
    return [sys.executable, *map(str, words)]


# ---- parts of its own: `gpu_report.py step`, `gpu_report.py quickstart`


def step(device: str = "cuda") -> int:
    """A bfloat16 step on the GPU is as near to float32 as the CPU's, within a factor of two."""
    from instructcore.config import OptimConfig
    from instructcore.data import Packed
    from instructcore.model import GPT, ModelConfig
    from instructcore.pretrain import next_token_loss, to_device
    from instructcore.train import AdamW, update

    torch.manual_seed(0)
    tokens, targets = torch.randint(0, 512, (2, 1024))
    cu_seqlens = torch.tensor([0, 300, 1024], dtype=torch.int32)
    shape = ModelConfig(vocab_size=512, layers=2, heads=4, width=256, context=1024)

    def of(where: str, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
        model = GPT(shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).to(where)
        packed = to_device(Packed(tokens, cu_seqlens, targets, 724), torch.device(where))
        loss = next_token_loss(model, packed, len(tokens))
        loss.backward()
        gradient = torch.cat([p.grad.detach().float().cpu().flatten() for p in model.parameters()])
        update(AdamW(model, OptimConfig()), 1e-3, 1.0)
        after = next_token_loss(model, packed, len(tokens))
        if not after < loss:
            raise SystemExit(f"the step on {where} does not lower the loss: {loss} to {after}")
        return loss.item(), gradient

    loss, truth = of("cpu", torch.float32)
    errors = {}
    for where in ("cpu", device):
        its_loss, gradient = of(where, torch.bfloat16)
        errors[where] = float((gradient - truth).norm() / truth.norm()), abs(its_loss - loss)
    print(f"gradient off by {errors[device][0]:.2%}, on the CPU {errors['cpu'][0]:.2%}")
    good = errors[device][0] <= 2 * errors["cpu"][0] and errors[device][1] <= 0.01 * loss
    return 0 if good else 1


def quickstart(device: str = "cuda") -> int:
    """All stages of the quickstart with fewer steps: about a minute."""
    from instructcore import quickstart as whole

    recipe = whole.recipe

    def short(*arguments: object) -> whole.Recipe:
        plan = recipe(*arguments)
        return whole.Recipe(
            replace(plan.pretrain, steps=100),
            replace(plan.sft, epochs=1),
            replace(plan.reward, epochs=1),
            replace(plan.ppo, steps=4, run=replace(plan.ppo.run, save_every=0)),
        )

    whole.recipe = short
    with tempfile.TemporaryDirectory() as out:
        whole.run(whole.QuickstartConfig(device=device, out=f"{out}/quickstart"))
    return 0


# ---- what there is to run


def build() -> Part:
    major, minor = torch.cuda.get_device_capability()
    kind = f"{major}{minor}{'a' * (major >= 9)}-real"
    options = f"-Ccmake.define.CMAKE_CUDA_ARCHITECTURES={kind} -Ccmake.define.INSTRUCTCORE_CUDA=ON"
    install = python("-m", "pip", "install", "--no-build-isolation", "--no-deps", ROOT)
    return Part("build", [*install, *options.split()])


def tests() -> Iterator[Part]:
    for path in sorted((ROOT / "python_tests").glob("test_*.py")):
        if re.search(r"cuda|\(device", path.read_text(encoding="utf-8")):
            options = "-q -p no:cacheprovider -k cuda".split()
            yield Part(path.stem, python("-m", "pytest", *options, path))


def benchmarks(seconds: float) -> Iterator[Part]:
    """Each op's, in about `seconds` for all."""
    ops = sorted(p.stem.removeprefix("bench_") for p in BENCH.glob("bench_*.py"))
    each = max(3.0, seconds / len(ops) - 12)  # beside imports, compilation and a case's overrun
    options = f"--device cuda --record --rounds 7 --seconds {each:.0f}".split()
    for op in ops:
        shows = " ours |x faster|cannot run|left out|GB/s,"
        yield Part(f"bench {op}", python(BENCH / "bench.py", op, *options), shows)


# ---- running it


def run_part(part: Part, seconds: float, logs: Path) -> Result:
    """In a process group of its own."""
    begin, log = time.monotonic(), logs / f"{part.name.replace(' ', '_')}.log"
    if seconds <= 0:
        return Result(part.name, "NO TIME", 0.0, [])
    with log.open("w") as file:
        process = subprocess.Popen(
            part.command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, cwd=BENCH
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = [x for x in log.read_text(errors="replace").splitlines() if x.strip()] or [""]
    lines = [x for x in said if re.search(part.shows, x)] if part.shows else said[-1:]
    verdict = "pass" if status == 0 else "TIMEOUT" if status is None else "FAIL"
    if part.name.startswith("test_") and status in (0, 5) and " passed" not in said[-1]:
        verdict = "none"  # pytest: all were skipped (0), or there is nothing to run (5)
        if part.name == "test_emulator":  # the primitives' conformance is what all else rests on
            verdict = "FAIL"
    if verdict in ("FAIL", "TIMEOUT"):
        lines = [f"{said[-1]} ({log})", *(lines if part.shows else [])]
    return Result(part.name, verdict, time.monotonic() - begin, lines)


def report(logs: Path) -> Iterator[Result]:
    last = time.monotonic() + SECONDS

    def run(parts: list[Part], seconds: float, workers: int = 1) -> Iterator[Result]:
        def one(part: Part) -> Result:
            return run_part(part, min(seconds, last - time.monotonic()), logs)

        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(one, parts)

    yield from run([build()], 100)
    yield from run(list(tests()), 80, workers=8)
    yield from run([Part("bf16 training step", python(THIS, "step"))], 30)
    yield from run([Part("quickstart", python(THIS, "quickstart"))], 75)
    benches = list(benchmarks(last - time.monotonic()))
    yield from run(benches, 2 * (last - time.monotonic()) / len(benches))


def main(words: list[str]) -> int:
    if words:
        return {"step": step, "quickstart": quickstart}[words[0]](*words[1:])
    if not torch.cuda.is_available():
        print(f"gpu_report: torch {torch.__version__} finds no CUDA device", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    logs, bad = Path(tempfile.mkdtemp(prefix="gpu-report-")), []
    for result in report(logs):
        first = result.lines[0].strip("= ") if len(result.lines) == 1 else ""
        print(f"{result.name:<30} {result.verdict:<8} {result.seconds:6.1f} s  {first}", flush=True)
        for line in result.lines if not first else ():
            print(f"    {line}")
        bad += [result.name] if result.verdict not in ("pass", "none") else []
    print(f"not passed: {', '.join(bad)}; output in {logs}" if bad else "all passed")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
