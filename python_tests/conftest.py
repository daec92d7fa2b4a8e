from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import emulated
import pytest

# The clone's root holds `instructcore/` without its compiled module: an installed package must win.
ROOT = Path(__file__).resolve().parents[1]
if not list((ROOT / "instructcore").glob("_C*.so")):
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

import torch  # noqa: E402

from instructcore import _C  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


BACKENDS = ("cpu", "emulated", "cuda")


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="the long loops: 100 kills per stage instead of 5, ..."
    )
    parser.addoption(
        "--emulator", choices=emulated.FLAVOURS, default="fast", help="build of the emulated tests"
    )
    parser.addoption(
        "--broken", default="", metavar="OP:CSRC", help="an op's emulated kernels from elsewhere"
    )
    parser.addoption(
        "--thin", type=int, default=1, metavar="N", help="every N-th emulated case of a test only"
    )
    parser.addoption("--seed", type=int, default=0, help="of the emulated threads' schedule")


def pytest_configure(config):
    config.addinivalue_line("markers", "big: a case too long for the emulator")
    config.addinivalue_line(
        "markers", "kernel(op): whose CUDA kernel it takes, where the file's name does not say"
    )


def pytest_collection_modifyitems(config, items):
    """The GPU's kernels know no CPU instruction set, and the emulator does small cases only."""
    best = _C.build_info()["isa"]
    thin, emulated_cases = config.getoption("--thin"), Counter()

    def wanted(item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        backend = parameters.get("backend", "cpu")
        if backend != "cpu" and parameters.get("isa", best) != best:
            return False
        if backend != "emulated":
            return True
        if item.get_closest_marker("big"):
            return False
        emulated_cases[item.originalname] += 1
        return emulated_cases[item.originalname] % thin == 1 % thin

    kept = [item for item in items if wanted(item)]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=list(set(items) - set(kept)))
        items[:] = kept


def emulated_module(config):
    return emulated.load(config.getoption("--emulator"), config.getoption("--broken"))


@pytest.fixture
def full(request) -> bool:
    return request.config.getoption("--full")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    """Who runs the kernels: the CPU's, CUDA's on the emulator, or CUDA's on a GPU."""
    marked = request.node.get_closest_marker("kernel")
    op = marked.args[0] if marked else request.path.stem.removeprefix("test_")
    op = op.removeprefix("linear_")
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if op not in _C.build_info()["cuda_ops"]:
            pytest.skip(f"this build has no CUDA kernel for {op}")
    if request.param == "emulated":
        if reason := emulated.missing():
            if os.environ.get("INSTRUCTCORE_REQUIRE_EMULATOR"):
                pytest.fail(reason)
            pytest.skip(reason)
        module = emulated_module(request.config)
        if op not in module.build_info()["cuda_ops"]:
            pytest.skip(f"there is no CUDA kernel for {op}")
        module.set_schedule("random", "late", request.config.getoption("--seed"))
        emulated_ops = module.build_info()["cuda_ops"]
        for name, python in list(sys.modules.items()):
            stem = name.removeprefix("instructcore.ops.")
            known = stem.startswith("_") or stem.removeprefix("linear_") in emulated_ops
            if stem != name and known and hasattr(python, "_C"):
                monkeypatch.setattr(python, "_C", module)
    return request.param


@pytest.fixture
def device(backend) -> str:
    """Where a test's tensors lie; the emulator works on those of the CPU."""
    return "cuda" if backend == "cuda" else "cpu"


@pytest.fixture(params=list(DTYPES))
def dtype(request) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(autouse=True)
def best_isa():
    """No test leaves another instruction set behind."""
    yield
    _C.set_isa(_C.build_info()["isa_supported"])


@pytest.fixture(params=_C.isa_levels())
def isa(request):
    """Runs the test at every instruction set that this machine has."""
    _C.set_isa(request.param)
    return request.param


@pytest.fixture
def threads(request):
    """threads(n) sets torch's thread count, or on the emulator an order of the GPU's threads.

    The old count comes back after the test.
    """
    before = torch.get_num_threads()
    backend = request.getfixturevalue("backend") if "backend" in request.fixturenames else "cpu"

    def choose(n: int) -> None:
        torch.set_num_threads(n)
        if backend == "emulated":
            order = {1: "first", 2: "last"}.get(n, "random")
            emulated_module(request.config).set_schedule(order, "random", n)

    yield choose
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
