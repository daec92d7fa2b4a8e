"""The rules of the house that a reader could break without noticing."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))
OPS = sorted(p.stem for p in (ROOT / "instructcore" / "ops").glob("[!_]*.py"))
# The linear forms are GEMMs around the kernels of the op they are named after.
KERNEL_OF = {
    "linear_cross_entropy": "cross_entropy",
    "linear_token_logprobs": "token_logprobs",
}
# On a GPU these are torch's own functions.
ON_CUDA_BY_TORCH = {"activation", "add_norm", "linear", "rotary"}


def test_no_torch_header():
    for path in SOURCES:
        found = re.search(r"#include [<\"](torch|ATen|c10)/", path.read_text())
        assert not found, f"{path}: {found[0]}"


def test_ptx_and_launches_live_in_gpu_cuh():
    for path in SOURCES:
        if path.name == "gpu.cuh" or path.suffix not in (".cu", ".cuh"):
            continue
        found = re.search(r"\basm\b|__shared__|<<<", path.read_text())
        assert not found, f"{path}: {found[0]} belongs in gpu.cuh"


def test_every_cuda_kernel_is_built_and_named():
    kernels = {p.stem for p in (ROOT / "csrc").glob("*.cu")} - {"device"}
    listed = re.findall(r"csrc/(\w+)\.cu\b", (ROOT / "CMakeLists.txt").read_text())
    assert kernels == set(listed) - {"device"}
    ops = re.search(r"kCudaOps\[\] = {([^}]*)}", (ROOT / "csrc" / "module.cpp").read_text())[1]
    named = set(re.findall(r'"(\w+)"', ops))
    missing = {op for op in named if not any(k.split(".")[0].startswith(op) for k in kernels)}
    assert not missing, f"kCudaOps names {missing}, which have no csrc/<op>.cu"


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_files(op):
    kernel = KERNEL_OF.get(op, op)
    for path in (
        f"csrc/{kernel}.h",
        f"csrc/{kernel}_cpu.cpp",
        *([] if kernel in ON_CUDA_BY_TORCH else [f"csrc/{kernel}.cu"]),
        f"python_tests/test_{op}.py",
        f"bench/bench_{op}.py",
    ):
        assert (ROOT / path).exists(), f"{op} lacks {path}"
    assert op in (ROOT / "README.md").read_text(), f"{op} is missing from the README's op table"


def code_lines(path: Path) -> int:
    """Lines of a module that hold code: no blank ones, comments or docstrings."""
    source, lines = path.read_text(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_code_lines(tmp_path):
    path = tmp_path / "three.py"
    path.write_text(
        '"""One."""\n\n# Two.\nx = """a\n\nb"""  # 4, 5 and 6\n\n\ndef f():\n    "Eight."\n'
    )
    assert code_lines(path) == 4


@pytest.mark.parametrize(
    ("files", "most"), [(("scheduler",), 650), (("serve", "serve_wire"), 500)], ids=str
)
def test_size(files, most):
    """What is to stay small enough to be read at one go."""
    assert sum(code_lines(ROOT / "instructcore" / f"{name}.py") for name in files) <= most
