"""Builds the emulated module: module.cpp and the CUDA kernels under g++, on csrc/emulator.

Three flavours. `fast` shows wrong values; `check` also races, uninitialised reads and reads of data
in flight in a block's shared memory; `asan` accesses out of bounds, of shared and of global memory
(the process needs `environment("asan")`). Objects are cached by the hash of what they are made of.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

CSRC = Path(__file__).resolve().parents[1] / "csrc"
EMULATOR = ("emulator/emulator.cpp", "emulator/shadow.cpp")
MODULE = ("module.cpp", "isa.cpp", "pages.cpp", "emulator/device.cpp")
KERNELS = tuple(sorted(p.name for p in CSRC.glob("*.cu") if p.name != "device.cu"))

COMMON = [
    "-std=c++20", "-fPIC", "-fvisibility=hidden", "-DIC_EMULATED=1", "-DIC_CUDA=1", "-g1",
    # A kernel reads the words of a vector as other types; g++ must not assume otherwise.
    "-fno-strict-aliasing", "-ffp-contract=off",
    "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi",
]  # fmt: skip
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
# For the kernels; for the emulator; for linking. A check build has its own __tsan_* (emulator.cpp).
FLAVOURS = {
    "fast": (["-O2"], ["-O2"], []),
    "check": (["-O1", "-fsanitize=thread"], ["-O2", "-DIC_EMULATOR_CHECK=1"], []),
    "asan": (["-O1", *SANITIZE], ["-O1", *SANITIZE], SANITIZE),
}


def missing() -> str:
    """Why nothing can be built here; empty if it can."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "the CUDA emulator switches stacks on x86-64 only"
    if shutil.which(_compiler()) is None:
        return f"the CUDA emulator needs {_compiler()}"
    if importlib.util.find_spec("pybind11") is None:
        return "the CUDA emulator's module needs pybind11"
    return ""


def environment(flavour: str) -> dict[str, str]:
    """What a process needs to load that flavour."""
    if flavour != "asan":
        return {}
    libraries = [
        subprocess.run([_compiler(), f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        "LD_PRELOAD": " ".join(found.stdout.strip() for found in libraries),
        # Python leaks by design; kernels run on stacks of their own.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }


@functools.cache
def load(flavour: str = "fast", broken: str = "") -> ModuleType:
    """The emulated `_C`, built if need be. `broken`: "op:csrc", that op's kernels come from
    other sources."""
    op, _, csrc = broken.partition(":")
    elsewhere = {name: Path(csrc) for name in KERNELS if op and name.startswith(op)}
    path = build_module(flavour, elsewhere)
    loader = importlib.machinery.ExtensionFileLoader("_C", str(path))
    spec = importlib.util.spec_from_file_location("_C", path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def build_module(flavour: str, elsewhere: dict[str, Path]) -> Path:
    """`elsewhere`: the csrc of those kernels that are not to come from CSRC."""
    kernels, runtime, link = FLAVOURS[flavour]
    import pybind11

    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    sources = [(CSRC, name, ["-O1", *python]) for name in MODULE]  # one object for all flavours
    sources += [(elsewhere.get(name, CSRC), name, ["-x", "c++", *kernels]) for name in KERNELS]
    sources += [(CSRC, name, runtime) for name in EMULATOR]
    return _link(_objects(sources), ["-shared", *link], "_C.so")


def build_program(flavour: str, source: str) -> Path:
    """An executable of one .cu file with a main()."""
    flags, runtime, link = FLAVOURS[flavour]
    sources = [(CSRC, source, ["-x", "c++", *flags])]
    sources += [(CSRC, name, runtime) for name in EMULATOR]
    return _link(_objects(sources), ["-rdynamic", *link], Path(source).stem)


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _cache() -> Path:
    path = Path(tempfile.gettempdir()) / f"instructcore-emulated-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def _with_includes(path: Path, csrc: Path, seen: dict[Path, bytes]) -> dict[Path, bytes]:
    """The file and, transitively, what it includes in quotes."""
    if path not in seen and path.exists():
        seen[path] = path.read_bytes()
        for name in re.findall(rb'#include "([^"]+)"', seen[path]):
            for folder in (path.parent, csrc):
                _with_includes((folder / name.decode()).resolve(), csrc, seen)
    return seen


def _objects(sources: list[tuple[Path, str, list[str]]]) -> list[Path]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a compiler is a process of its own
        return list(pool.map(lambda source: _object(*source), sources))


def _object(csrc: Path, source: str, flags: list[str]) -> Path:
    command = [_compiler(), *COMMON, f"-I{csrc}", *flags, "-c", str(csrc / source)]
    content = b"".join(_with_includes(csrc / source, csrc.resolve(), {}).values())
    return _make(command, content, Path(source).stem + ".o", str(csrc))


def _link(objects: list[Path], flags: list[str], name: str) -> Path:
    command = [_compiler(), *map(str, objects), *flags, "-ldl", "-lpthread"]
    return _make(command, b"", name, "")


def _make(command: list[str], content: bytes, name: str, csrc: str) -> Path:
    """Runs `command -o <name>` unless the cache has the result of it, wherever `csrc` is."""
    words = [word.replace(csrc, "csrc") if csrc else word for word in command]
    key = hashlib.sha256(content + "\0".join(words).encode()).hexdigest()[:20]
    target = _cache() / key / name
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as fresh:
            made = Path(fresh) / name
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            made.replace(target)
    return target
