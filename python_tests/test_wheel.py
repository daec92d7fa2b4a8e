"""The package as it is installed: quick to import, linked to nothing of torch's or CUDA's, and
without what only the tests need."""

from __future__ import annotations

import importlib.metadata
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from instructcore import _C


def test_import_time():
    """Of the ops and of adapters that import no other library, beyond `import torch`: half a second
    at most."""
    code = (
        "import torch, time; start = time.perf_counter(); import instructcore.ops; "
        "from instructcore.adapters import cce, cleanrl, flash_attn, liger, torchrl, trl, verl; "
        "print(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", code]
    seconds = [float(subprocess.check_output(command, text=True)) for _ in range(3)]
    assert statistics.median(seconds) <= 0.5, seconds


def test_links_neither_torch_nor_cuda():
    if not (readelf := shutil.which("readelf")):
        pytest.skip("readelf is not installed")
    shown = subprocess.check_output([readelf, "-d", _C.__file__], text=True)
    needed = [line.split("[")[1].rstrip("]") for line in shown.splitlines() if "NEEDED" in line]
    known = ("libstdc++.", "libgcc_s.", "libm.", "libc.", "libpthread.", "libdl.", "librt.", "ld-")
    assert needed and all(name.startswith(known) for name in needed), needed


def test_has_no_emulator():
    assert not hasattr(_C, "set_schedule")


def test_files():
    """Python, the module, the bundled text and page, and nothing else."""
    try:
        installed = importlib.metadata.distribution("instructcore")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the tests run on a source tree that is not installed")
    files = [Path(file) for file in installed.files or ()]
    ours = [x for x in files if x.parts[0] == "instructcore" and "__pycache__" not in x.parts]
    if Path("instructcore/__init__.py") not in ours:
        pytest.skip("instructcore is installed in editable mode")
    assert sum(x.name.startswith("_C") for x in ours) == 1
    unknown = [x for x in ours if x.suffix not in (".py", ".so") and x.parts[1] != "static"]
    assert not unknown
    roots = {x.parts[0].partition("-")[0] for x in files if ".." not in x.parts}
    assert roots <= {"instructcore", "instructcore.libs"}, roots
