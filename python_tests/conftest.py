from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The clone's root holds `instructcore/` without its compiled module: an installed package must win.
ROOT = Path(__file__).resolve().parents[1]
if not list((ROOT / "instructcore").glob("_C*.so")):
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

import torch  # noqa: E402

from instructcore import _C  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="the long loops: 100 kills per stage instead of 5, ..."
    )


@pytest.fixture
def full(request) -> bool:
    return request.config.getoption("--full")


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if not _C.build_info()["cuda_ops"]:
            pytest.skip("this build has no CUDA kernels")
    return request.param


@pytest.fixture(params=list(DTYPES))
def dtype(request) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(params=_C.isa_levels())
def isa(request):
    """Runs the test at every instruction set that this machine has."""
    best = _C.build_info()["isa"]
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(best)


@pytest.fixture
def threads():
    """threads(n) sets torch's thread count; the old one comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def dirty_memory():
    """Fresh tensors hold NaN, so what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def peak():
    """peak(f): the bytes that f() holds at most at a time, on the CPU, and its result."""

    def measure(f):
        with torch.profiler.profile(profile_memory=True) as profile:
            result = f()
        events = profile.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        held = torch.tensor([0, *(size for _, size in changes)]).cumsum(0)
        return int(held.max()), result

    return measure
