"""Measure the kernels against their rivals.

    python bench/bench.py gae              # print the table
    python bench/bench.py gae --record     # and append rows to bench/results/<device>.csv

Each bench_<op>.py offers `cases(device)`, which yields `Case`s. All variants of a case are timed in
interleaved rounds, so that a busy machine hits them alike; a round's ratio is taken within the
round. Bytes and FLOPs are what the algorithm must move and do, derived beside each case.

On a CPU what was called before comes to rest, and one call is not timed unless it needs a setup or
takes long. On a GPU each call is timed by CUDA events, behind a write of more than L2 holds and a
pause in which the host gets ahead; rounds take turns between two sets of a case's tensors.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import importlib
import itertools
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).parent
# Seconds. torch's OpenMP threads look for work for 5 ms after a call, on cores that others need.
REST = 0.01
FIELDS = (
    "op,variant,pass,dtype,case,p20_us,p50_us,p80_us,bytes,flops,pct_roofline,device,torch,commit,date,"
    "command"
).split(",")


@dataclass
class Case:
    """One row group: the same work done by `ours` and each rival."""

    name: str  # shape, as shown
    dtype: str
    run: str  # "fwd", "bwd" or "fwd+bwd"
    variants: dict[str, Callable[[], object]]  # "ours" first
    bytes: float = 0.0  # that must cross memory, once
    flops: float = 0.0
    setup: dict[str, Callable[[], object]] = field(
        default_factory=dict
    )  # untimed, before each call


def liger(name: str) -> Callable | None:
    """A function of the Liger kernels, if they are installed."""
    try:
        return getattr(importlib.import_module("liger_kernel.transformers.functional"), name)
    except ImportError:
        return None


def copies(device: str) -> int:
    """How many sets of a case's tensors there are, used in turn."""
    return 2 if device == "cuda" else 1


@functools.cache
def scratch() -> torch.Tensor:
    """More than any L2 holds."""
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")


def time_on_gpu(f: Callable[[], object], setup: Callable | None, calls: int) -> float:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in events:
        if setup is not None:
            setup()
        scratch().zero_()
        torch.cuda._sleep(500_000)  # 0.3 ms
        start.record()
        f()
        end.record()
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) / calls / 1e3


def time_once(
    f: Callable[[], object], setup: Callable | None, device: str, calls: int, wake: bool = True
) -> float:
    """Seconds per call, over `calls` calls (one when there is a setup to run before each); `wake`:
    after one more."""
    calls = calls if setup is None else 1
    if device == "cuda":
        return time_on_gpu(f, setup, calls)
    if setup is not None:
        setup()
    time.sleep(REST)
    if setup is None and wake:
        f()  # wakes the threads that it uses
    start = time.perf_counter()
    for _ in range(calls):
        f()
    return (time.perf_counter() - start) / calls


def measure(
    group: Sequence[Case], device: str, rounds: int, budget: float = 0.02
) -> dict[str, list[float]]:
    """Interleaved rounds over one case's sets of tensors: seconds per call for each variant.

    A rival that cannot run is named and left out.
    """
    brief: dict[str, bool] = {}
    calls, most = {}, 10 if device == "cuda" else 1_000_000  # the flush takes as long as most calls
    for name in group[0].variants:
        try:
            for case in group:
                f, setup = case.variants[name], case.setup.get(name)
                time_once(f, setup, device, 1, wake=False)
            once = time_once(f, setup, device, 1, wake=False)
        except Exception as error:
            if name == "ours":
                raise
            print(f"{name} cannot run {group[0].name} {group[0].dtype}: {str(error)[:200]!r}")
            continue
        calls[name] = max(1, min(most, int(budget / max(once, 1e-7))))
        brief[name] = once < 0.1  # a longer one's threads need no help
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        case = group[index % len(group)]
        for name in calls:
            f, setup = case.variants[name], case.setup.get(name)
            times[name].append(time_once(f, setup, device, calls[name], brief[name]))
    return times


def rooflines(device: str) -> tuple[float, dict[str, float]]:
    """(bytes/s of a copy, FLOP/s of a GEMM per dtype), measured here and now."""
    size = 1 << 30 if device == "cuda" else 64 << 20
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = min(time_once(lambda: target.copy_(source), None, device, 3) for _ in range(5))
    rates = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        n = 8192 if device == "cuda" else 1536
        a = torch.randn(n, n, device=device).to(dtype)
        seconds = min(time_once(lambda a=a: a @ a, None, device, 1) for _ in range(4))
        rates[name] = 2.0 * n**3 / seconds
    rates["float16"] = rates["bfloat16"] if device == "cuda" else rates["float32"]
    return 2.0 * source.numel() / copy, rates


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name().replace(" ", "-")
    model = "cpu"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = re.sub(r"\((R|TM)\)| Processor", "", line.split(":")[1]).strip()
            break
    from instructcore import _C

    return f"{model} {torch.get_num_threads()} threads {_C.build_info()['isa']}".replace(" ", "-")


def quantile(values: list[float], q: float) -> float:
    values = sorted(values)
    return values[min(len(values) - 1, round(q * (len(values) - 1)))]


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    )
    return found.stdout.strip() or "unknown"


def rows_of(
    op: str,
    cases: Callable[[str], Iterator[Case]],
    device: str,
    rounds: int,
    most: int,
    seconds: float,
) -> Iterator[dict]:
    """Of the first `most` cases, or as many as begin within `seconds`."""
    end = time.perf_counter() + seconds
    bandwidth, rates = rooflines(device)
    print(
        f"{device_name(device)}: copy {bandwidth / 1e9:.0f} GB/s, GEMM "
        + ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in rates.items())
    )
    print(
        f"{'case':<44} {'dtype':<9} {'pass':<8} {'variant':<22} {'p50 us':>10} {'GB/s':>7} "
        f"{'GF/s':>7} {'% roof':>7}  ours is (quartiles)"
    )
    groups = zip(*(cases(device) for _ in range(copies(device))), strict=True)
    for group in itertools.islice(groups, most):
        if time.perf_counter() > end:
            print(f"{seconds:.0f} s are over: {group[0].name} and what follows are left out")
            return
        case, times = group[0], measure(group, device, rounds)
        floor = max(case.bytes / bandwidth, case.flops / rates[case.dtype])
        for name, taken in times.items():
            p50 = statistics.median(taken)
            roof = 100 * floor / p50 if floor else float("nan")
            ratio = ""
            if name != "ours":
                ratios = [t / o for t, o in zip(taken, times["ours"], strict=True)]
                low, mid, high = (quantile(ratios, q) for q in (0.25, 0.5, 0.75))
                ratio = f"{mid:.2f} x faster ({low:.2f}-{high:.2f})"
            print(
                f"{case.name:<44} {case.dtype:<9} {case.run:<8} {name:<22} {p50 * 1e6:>10.1f} "
                f"{case.bytes / p50 / 1e9:>7.1f} {case.flops / p50 / 1e9:>7.1f} {roof:>7.1f}"
                f"  {ratio}"
            )
            yield {
                "op": op,
                "variant": name,
                "pass": case.run,
                "dtype": case.dtype,
                "case": case.name,
                "p20_us": f"{quantile(taken, 0.2) * 1e6:.2f}",
                "p50_us": f"{p50 * 1e6:.2f}",
                "p80_us": f"{quantile(taken, 0.8) * 1e6:.2f}",
                "bytes": f"{case.bytes:.0f}",
                "flops": f"{case.flops:.0f}",
                "pct_roofline": f"{roof:.1f}",
                "device": device_name(device),
                "torch": torch.__version__,
                "commit": commit(),
                "date": datetime.date.today().isoformat(),
                "command": f"python bench/bench.py {op}"
                + (" --device cuda" if device == "cuda" else ""),
            }


def record(rows: list[dict], device: str) -> Path:
    path = HERE / "results" / f"{device_name(device)}.csv"
    path.parent.mkdir(exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
    return path


def main() -> int:
    ops = {path.stem[len("bench_") :] for path in HERE.glob("bench_*.py")}
    ops = sorted(ops - {"bits"})  # a program of its own: it compares, and measures nothing
    # Ops that are measured with the one they belong to.
    within = {"attention_varlen": "attention", "attention_paged_": "attention"}
    within |= {"whiten_advantages": "ppo_advantage", "swiglu": "activation", "gelu": "activation"}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "op", nargs="+", choices=[*ops, *within, "all"], metavar="op", help=", ".join(ops)
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default 9)")
    parser.add_argument(
        "--record", action="store_true", help="append to bench/results/<device>.csv"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="per op, after which no case begins"
    )
    parser.add_argument("--quick", action="store_true", help="the first two cases, three rounds")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    chosen = dict.fromkeys(within.get(op, op) for op in options.op)
    for op in ops if "all" in chosen else chosen:
        cases = importlib.import_module(f"bench_{op}").cases
        print(f"\n{op}")
        rounds, most = (3, 2) if options.quick else (options.rounds, sys.maxsize)
        rows = list(rows_of(op, cases, options.device, rounds, most, options.seconds))
        if options.record:
            print(f"recorded in {record(rows, options.device)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
