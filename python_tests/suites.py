"""Other libraries' own tests with our kernels in place of theirs, put there by adapters' `use()`.

    python python_tests/suites.py trl=CHECKOUT trl_kernels=CHECKOUT@COMMIT liger=CHECKOUT ...

CHECKOUT holds the library's repository; COMMIT is named where it has no history. Needs pytest,
einops and trl 1.16. A suite runs in a process of its own, whose pytest plugin this file is: modules
of GPU kernels are mocks that skip the test when called, and tensors asked for on CUDA lie on the
CPU. Rules leave cases out, which are counted; no test and no tolerance is changed. Writes
bench/results/suites.md.
"""

from __future__ import annotations

import collections
import importlib
import importlib.abc
import importlib.machinery
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "suites.md"
REPORT = """# Other libraries' tests

By `python python_tests/suites.py`, with one thread; docs/adapters.md judges what does not pass.
Ran: as many as passed, were refused and failed. Refused: an error of ours says what no kernel does.
Left out: by the harness or by the test itself.

| suite | version and commit | ran | passed | refused | failed | left out |
|---|---|---|---|---|---|---|
"""


class Suite(NamedTuple):
    title: str
    adapter: str
    library: str
    files: list
    source: str | None = None  # where the checkout has the library; None: the installed one is used
    mocks: tuple = ()  # modules of GPU kernels, and all below them
    cuda: bool = False  # whether the tests ask for CUDA
    most: int = 10**9  # cases of one test: each k-th of the product of its parameters
    rules: dict = {}  # why a case is left out: whether, by its test's name and its parameters


TRL, LIGER, CCE = "tests/test_utils.py::Test", "test/transformers/test_", "tests/test_cce_loss_"
SUITES = {
    "trl": Suite(
        "TRL: `selective_log_softmax`, `entropy_from_logits`",
        *("trl", "trl", [f"{TRL}EntropyFromLogits", f"{TRL}SelectiveLogSoftmax"]),
    ),
    "trl_kernels": Suite(
        "TRL: `selective_log_softmax_and_entropy`, `ChunkedLogProbFunction`",
        *("trl", "trl", ["tests/test_kernels.py"]),
    ),
    "liger": Suite(
        "Liger-Kernel: cross entropy, also fused with the head",
        *("liger", "liger_kernel"),
        [f"{LIGER}cross_entropy.py", f"{LIGER}fused_linear_cross_entropy.py"],
        source="src",
        mocks=("liger_kernel.ops",),
        rules={"more than 2^26 logits": lambda _, c: math.prod(c.get(x, 1) for x in "BTV") > 2**26},
    ),
    "cce": Suite(
        "Cut Cross-Entropy: `linear_cross_entropy`",
        *("cce", "cut_cross_entropy", [f"{CCE}forward.py", f"{CCE}backward.py"], "."),
        mocks=("cut_cross_entropy.cce",),
        cuda=True,
        most=200,
        rules={"`impl` other than cce": lambda _, case: case.get("impl", "cce") != "cce"},
    ),
    "flash_attn": Suite(
        "flash-attention: `flash_attn_func`, `_varlen_func`, `_with_kvcache`",
        *("flash_attn", "flash_attn", ["tests/test_flash_attn.py"], "."),
        mocks=("flash_attn_2_cuda", "flash_attn.ops.triton"),
        cuda=True,
        most=40,
        rules={
            "functions of packed arguments, and private ones": lambda name, case: (
                "qkvpacked" in name or "num_splits" in name or case.get("kvpacked")
            ),
            "250 repetitions of each case": lambda name, _: "race_condition" in name,
            "dropout": lambda _, case: case.get("dropout_p"),
            "more than 512 tokens": lambda _, c: max(c.get(f"seqlen_{x}", 0) for x in "qk") > 512,
        },
    ),
}


class Kernels(mock.MagicMock):
    def __call__(self, *args, **kwargs):
        pytest.skip("call a kernel that needs a GPU")


class Mocks(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if any(f"{name}.".startswith(f"{mocked}.") for mocked in suite.mocks):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Kernels(name=spec.name)

    def exec_module(self, module):
        pass


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def rotate(x, cos, sin, seqlen_offsets=0, interleaved=False):
    """flash-attention's `apply_rotary_emb`, which is Triton's, by its form in torch, in float32."""
    from flash_attn.layers.rotary import apply_rotary_emb_torch

    at = torch.as_tensor(seqlen_offsets).reshape(-1, 1) + torch.arange(x.shape[1])
    return apply_rotary_emb_torch(x.float(), cos.float()[at], sin.float()[at], interleaved).to(x)


def pytest_addoption(parser):
    for name in ("--suite", "--outcome"):
        parser.addoption(name)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config):
    """Everything in place before the first of their modules is imported."""
    global suite, outcome
    options = early_config.known_args_namespace
    suite = SUITES[options.suite]
    outcome = {kind: collections.Counter() for kind in ("ends", "left out", "refused", "failed")}
    adapter = importlib.import_module(f"instructcore.adapters.{suite.adapter}")
    sys.meta_path.insert(0, Mocks())
    if suite.cuda:
        torch.cuda.is_available = lambda: True
        torch.cuda.get_device_capability = lambda device=None: (8, 0)
        torch.cuda.get_device_properties = lambda device: mock.Mock(total_memory=2**40)
        torch.cuda.manual_seed = torch.manual_seed
        OnCpu().__enter__()
    if suite.library == "flash_attn":
        importlib.import_module("flash_attn.layers.rotary").apply_rotary_emb = rotate
    if suite.library == "liger_kernel":  # in a mock's dict, where `use()` looks
        ops = importlib.import_module("liger_kernel.ops")
        for name in ("LigerCrossEntropyFunction", "LigerFusedLinearCrossEntropyFunction"):
            vars(ops)[name] = getattr(ops, name)
    print(*adapter.use(), sep="\n")
    if suite.library == "trl":
        for name in ("trl.trainer.utils", "trl.import_utils"):  # what other versions' tests import
            importlib.import_module(name).__getattr__ = lambda _: lambda: False
        kernels = importlib.import_module("trl.kernels")
        kernels.selective_log_softmax_and_entropy = adapter.selective_log_softmax_and_entropy
    outcome["version"] = getattr(sys.modules[suite.library], "__version__", "")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """In place of all parametrizations one, of the cases that are not left out."""
    item, names, values, kept = metafunc.definition, [], [], []
    for mark in item.iter_markers("parametrize"):
        more = mark.args[0]
        more = more.replace(" ", "").split(",") if isinstance(more, str) else list(more)
        names, one = names + more, len(more) == 1
        values.append([getattr(x, "values", (x,) if one else x) for x in mark.args[1]])
    item.own_markers = [mark for mark in item.own_markers if mark.name != "parametrize"]
    for chosen in itertools.product(*values):
        case = dict(zip(names, itertools.chain(*chosen), strict=True))
        why = next((why for why, hit in suite.rules.items() if hit(item.name, case)), None)
        if why is None:
            kept.append(tuple(case.values()))
        else:
            outcome["left out"][why] += 1
    step = max(1, math.ceil(len(kept) / suite.most))
    while math.gcd(step, len(kept)) > 1:  # so that every value of every parameter comes up
        step += 1
    picked = kept[::step]
    outcome["left out"][f"all but {suite.most} of a test, each k-th"] += len(kept) - len(picked)
    if names or not kept:
        metafunc.parametrize(names, picked)


def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if "NOTSET" not in item.name]  # no case was kept
    for node in {node for item in items for node in item.listchain()}:  # they ask for a GPU
        node.own_markers = [mark for mark in node.own_markers if mark.name != "skipif"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when != "call" and report.outcome == "passed":
        return report
    end, error = report.outcome, call.excinfo
    if end == "failed":
        said = str(error.value).strip().partition(", got")[0].partition("\n")[0]
        ours = Path(error.traceback[-1].path).is_relative_to(ROOT / "instructcore")
        end = "refused" if ours else end
        outcome[end][said if ours else f"{item.function.__name__}: {said}"] += 1
    elif end == "skipped":
        outcome["left out"][error.value.msg or "the test itself skips"] += 1
    outcome["ends"][end] += 1
    return report


def pytest_sessionfinish(session):
    Path(session.config.getoption("outcome")).write_text(json.dumps(outcome))


def run(name: str, root: Path) -> dict:
    """The outcome of a suite, in a process of its own with one thread."""
    chosen = SUITES[name]
    places = [ROOT / "python_tests", ROOT]
    places += [] if chosen.source is None else [root, root / chosen.source]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "OMP_NUM_THREADS": "1"}
    env["TORCHDYNAMO_DISABLE"] = str(int(chosen.cuda))
    with tempfile.TemporaryDirectory() as where:
        settings, outcome = Path(where, "pytest.ini"), Path(where, "outcome.json")
        settings.write_text("[pytest]\n")
        command = [sys.executable, "-P", "-m", "pytest", "-q", "--tb=line", "-p", "suites"]
        command += ["-p", "no:cacheprovider", "-c", settings, f"--rootdir={root}", "--suite", name]
        command += ["--outcome", outcome]
        subprocess.run([*command, *(root / file for file in chosen.files)], cwd=where, env=env)
        return json.loads(outcome.read_text())


def main() -> None:
    table, lists = [], []
    for name, checkout in (argument.split("=", 1) for argument in sys.argv[1:]):
        path, _, commit = checkout.partition("@")
        root, git = Path(path).resolve(), ["git", "-C", path, "describe", "--tags", "--always"]
        commit = commit or subprocess.check_output(git, text=True).strip()
        found, title = run(name, root), SUITES[name].title
        ends = [found["ends"].get(end, 0) for end in ("passed", "refused", "failed")]
        cells = [title, f"{found['version']} {commit}".strip(), sum(ends), *ends]
        cells.append(sum(found["left out"].values()))
        table.append(f"| {' | '.join(map(str, cells))} |\n")
        lists.append(f"\n## {title}\n\n")
        for kind in ("left out", "refused", "failed"):
            lists += [f"* {kind}, {n}: {why}\n" for why, n in found[kind].items() if n]
    RESULTS.write_text(REPORT + "".join(table + lists), encoding="utf-8")


if __name__ == "__main__":
    main()
