"""Every op in each of torch's modes: compiled for any size, exported, under autocast, checkpointed,
in data parallel, captured. Same bits as called plainly, on the CPU.

    python test_modes.py OUT  # what test_data_parallel has torchrun start
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tolerance import assert_same_bits
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from instructcore import _C, ops

# No two sizes are alike: those that are, the compiler ties to each other.
B, T, C, V = 3, 7, 16, 33
SIZES = 5, 9


def rows(n, dim=C):
    return torch.randn(n, dim)


def targets(n):
    return torch.randint(V, (n,)).masked_fill(torch.arange(n) == 2, -100)


def steps(n, *names):
    """Float tensors (n, T) by name, and a mask that leaves something in each row."""
    mask = torch.rand(n, T) < 0.7
    mask[:, 0] = True
    return {name: torch.randn(n, T) for name in names} | {"mask": mask}


def heads(n, *more):
    return {name: torch.randn(*more, n, h, C) for name, h in (("q", 4), ("k", 2), ("v", 2))}


def packed(n):
    cu = torch.tensor([0, 2, 2, n], dtype=torch.int32)
    return heads(n) | {"cu_seqlens_q": cu, "cu_seqlens_k": cu.clone()}


def paged(n):
    """n sequences of a token each, after some that pages of 4 hold."""
    new = {f"{name}_new" if name != "q" else name: x for name, x in heads(n).items()}
    caches = {f"{name}_cache": torch.randn(6 * n, 4, 2, C) for name in "kv"}
    table = torch.randperm(6 * n)[: 3 * n].view(n, 3).int()
    held = torch.randint(12, (n,)).int()
    layout = {"block_table": table, "cache_seqlens": held}
    return caches | new | layout | {"cu_seqlens_q": torch.arange(n + 1, dtype=torch.int32)}


def turned(n):
    angles = rows(12, C // 2)
    return {"qkv": torch.randn(n, 8, C), "cos": angles.cos(), "sin": angles.sin()} | {
        "positions": torch.arange(n, dtype=torch.int32)
    }


def head(n):
    return {"hidden": rows(n), "weight": rows(V), "bias": torch.randn(V), "targets": targets(n)}


PAGED, HEADS, HEAD = "attention_paged_", ("q", "k", "v"), ("hidden", "weight", "bias")
PPO = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "entropy")
# op: what makes its tensors for a size n, the differentiable ones of them, and its other arguments
CASES: dict[str, tuple[Callable, tuple[str, ...], dict]] = {
    "add_norm": (
        lambda n: {"x": rows(n), "branch": rows(n), "weight": rows(C, 1)[:, 0]},
        ("x", "branch", "weight"),
        {"eps": 1e-5},
    ),
    "attention": (lambda n: heads(n, B), HEADS, {"window": (3, 0), "return_lse": True}),
    "attention_varlen": (packed, HEADS, {"softcap": 3.0}),
    PAGED: (paged, (), {}),
    "cross_entropy": (
        lambda n: {"logits": rows(n, V), "targets": targets(n)},
        ("logits",),
        {"label_smoothing": 0.1, "z_loss": 1e-3},
    ),
    "gae": (lambda n: steps(n, "rewards", "values"), (), {"gamma": 0.9, "lambda_": 0.8}),
    "gelu": (lambda n: {"x": rows(n)}, ("x",), {}),
    "linear": (
        lambda n: {"x": rows(n), "weight": rows(V), "bias": torch.randn(V)},
        ("x", "weight", "bias"),
        {},
    ),
    "linear_cross_entropy": (head, HEAD, {"z_loss": 1e-3}),
    "linear_token_logprobs": (head, HEAD, {"temperature": 0.7}),
    "ppo_advantage": (
        lambda n: {"scores": torch.randn(n), **steps(n, "logprobs", "ref_logprobs", "values")},
        (),
        {"kl_coef": 0.1, "gamma": 1.0, "lambda_": 0.95},
    ),
    "ppo_loss": (
        lambda n: steps(n, *PPO),
        ("logprobs", "values", "entropy"),
        {"entropy_coef": 0.01},
    ),
    "rotary": (turned, ("qkv",), {"heads": 4, "kv_heads": 2}),
    "sample": (
        lambda n: {"logits": rows(n, V), "seeds": torch.arange(n), "positions": torch.arange(n)},
        (),
        {"temperature": 0.8, "top_p": 0.9, "top_k": 5},
    ),
    "swiglu": (lambda n: {"gate_up": rows(n, 2 * C)}, ("gate_up",), {}),
    "token_logprobs": (
        lambda n: {"logits": rows(n, V), "targets": targets(n)},
        ("logits",),
        {"temperature": 0.7},
    ),
    "whiten_advantages": (
        lambda n: steps(n, "advantages") | {"mean": torch.tensor(0.1), "var": torch.tensor(2.0)},
        (),
        {},
    ),
}
DIFFERENTIABLE = [op for op, (_, leaves, _) in CASES.items() if leaves]


def make(op, n, device="cpu"):
    """The op's tensors by name, those of its gradients requiring one."""
    torch.manual_seed(n)
    named = {name: x.to(device) for name, x in CASES[op][0](n).items()}
    return {name: x.requires_grad_(name in CASES[op][1]) for name, x in named.items()}


class Module(torch.nn.Module):
    """The op behind a doubling: of tensors in the table's order, a tuple of all it gives, and of
    all it mutates."""

    def __init__(self, op):
        super().__init__()
        self.op, self.options = getattr(ops, op), CASES[op][2]
        self.names = list(CASES[op][0](SIZES[0]))

    def forward(self, *tensors):
        named = dict(zip(self.names, (2 * tensors[0], *tensors[1:]), strict=True))
        mutated = [name for name in named if name.endswith("_cache")]
        named |= {name: named[name].clone() for name in mutated}
        found = tree_leaves(self.op(**named, **self.options))
        found = [x for x in found if isinstance(x, torch.Tensor)]
        return (*found, *(named[name] for name in mutated))


def total(outputs):
    """The differentiable ones, weighted: each output has weights of its own."""
    generator = torch.Generator().manual_seed(0)
    weighted = [(torch.randn(x.shape, generator=generator).to(x.device) * x, x) for x in outputs]
    return sum(y.sum() for y, x in weighted if x.requires_grad)


def results(f, tensors):
    """All that f gives, and the gradients of their `total`."""
    found = list(f(*tensors))
    leaves = [x for x in tensors if x.requires_grad]
    return found + list(torch.autograd.grad(total(found), leaves) if leaves else [])


def check_same(ours, plain):
    for a, b in zip(ours, plain, strict=True):
        assert_same_bits(a.detach(), b.detach())


def test_every_op_is_here():
    assert {f"{op.rstrip('_')}_reference" for op in CASES} == {
        name for name in ops.__all__ if name.endswith("_reference")
    }


@pytest.mark.parametrize("op", CASES)
def test_compile(op):
    """For all sizes at once, as one graph, forward and backward."""
    torch.compiler.reset()
    module = Module(op)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    first, second = (list(make(op, n).values()) for n in SIZES)
    check_same(results(compiled, first), results(module, first))
    with torch.compiler.set_stance("fail_on_recompile"):
        ours = results(compiled, second)
    check_same(ours, results(module, second))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("op", CASES)
def test_export(op, strict):
    """For all sizes, and through a file."""
    module = Module(op)
    first, second = ([x.detach() for x in make(op, n).values()] for n in SIZES)
    varying = [
        {i: torch.export.Dim.AUTO for i in range(a.ndim) if a.shape[i] != b.shape[i]}
        for a, b in zip(first, second, strict=True)
    ]
    exported = torch.export.export(
        module, tuple(first), dynamic_shapes=(tuple(varying),), strict=strict
    )
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for tensors in (first, second):
        check_same(loaded(*tensors), module(*tensors))


@pytest.mark.parametrize("op", CASES)
def test_autocast(op):
    """`linear` and attention take its type, as torch's do. All else takes what it is given: float32
    alone, or bfloat16, from a matrix product, with float32 parameters."""
    module, named = Module(op), make(op, SIZES[0])
    cast = {"linear": HEAD[1:] + ("x",), "attention": HEADS, "attention_varlen": HEADS}.get(op, ())
    activations = {"branch"} if op == "add_norm" else {"x", "hidden", "logits", "gate_up", "qkv"}
    for low in ([], activations):
        given = {k: x.detach().bfloat16() if k in low else x.detach() for k, x in named.items()}
        given = {k: x.requires_grad_(named[k].requires_grad) for k, x in given.items()}
        with torch.autocast("cpu", torch.bfloat16):
            ours = module(*given.values())
        leaves = [x for x in given.values() if x.requires_grad]
        ours = [*ours, *(torch.autograd.grad(total(ours), leaves) if leaves else [])]

        def plain(*tensors, names=tuple(named)):
            pairs = zip(names, tensors, strict=True)
            return module(*(x.bfloat16() if k in cast else x for k, x in pairs))

        check_same(ours, results(plain, list(given.values())))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_checkpoint(op):
    module, tensors = Module(op), list(make(op, SIZES[0]).values())
    ours = results(lambda *x: checkpoint(module, *x, use_reentrant=False), tensors)
    check_same(ours, results(module, tensors))


class Everything(torch.nn.Module):
    """All differentiable ops, whose differentiable tensors are its parameters."""

    def __init__(self):
        super().__init__()
        self.modules_of = torch.nn.ModuleDict({op: Module(op) for op in DIFFERENTIABLE})
        self.tensors = {op: make(op, SIZES[0]) for op in DIFFERENTIABLE}
        leaves = {
            f"{op} {name}": torch.nn.Parameter(x.detach())
            for op, named in self.tensors.items()
            for name, x in named.items()
            if x.requires_grad
        }
        self.leaves = torch.nn.ParameterDict(leaves)

    def forward(self, factor):
        found = []
        for op, named in self.tensors.items():
            scaled = [
                factor * self.leaves[f"{op} {name}"] if x.requires_grad else x
                for name, x in named.items()
            ]
            found += self.modules_of[op](*scaled)
        return total(found)


def train_part(out: Path) -> None:
    """In each of torchrun's processes: the gradients of its part of the batch, averaged."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    module = Everything()
    parallel = DistributedDataParallel(module)  # which must outlive the backward
    parallel(1.0 + rank).backward()
    if rank == 0:
        torch.save([x.grad for x in module.parameters()], out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # without the interpreter's end, where threads of torch's may abort the process


def test_data_parallel(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, __file__, str(tmp_path / "gradients")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = []
    for factor in (1.0, 2.0):
        module = Everything()
        module(factor).backward()
        parts.append([x.grad for x in module.parameters()])
    ours = torch.load(tmp_path / "gradients")
    check_same(ours, [(a + b) / 2 for a, b in zip(*parts, strict=True)])
    assert all(x.abs().sum() > 0 for x in ours)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_graphed_callables_cuda(op):
    """Forward and backward as the two graphs that a training loop replays; test_every_op.py has
    each op in a graph by itself."""
    if not _C.build_info()["cuda"]:
        pytest.skip("this build has no CUDA kernels")
    module = Module(op)
    first, second = (list(make(op, SIZES[0], "cuda").values()) for _ in range(2))
    with torch.no_grad():
        second[0].neg_()  # read at each replay
    expected = results(module, second)
    graphed = torch.cuda.make_graphed_callables(lambda *x: module(*x), tuple(first))
    check_same(results(graphed, second), expected)


if __name__ == "__main__":
    train_part(Path(sys.argv[1]))
