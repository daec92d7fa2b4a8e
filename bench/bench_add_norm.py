"""add_norm with its gradient, as a residual layer uses it, against torch's own norms."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from bench import Case

from instructcore.ops import add_norm

SHAPES = {"cpu": ((1, 256), (2048, 256), (4096, 768)), "cuda": ((8192, 4096),)}


def by_torch(x, branch, weight, bias, dtype):
    total = x + branch
    if bias is None:
        return total, F.rms_norm(total, weight.shape, weight, 1e-5).to(dtype)
    return total, F.layer_norm(total, weight.shape, weight, bias, 1e-5).to(dtype)


def ours(x, branch, weight, bias, dtype):
    return add_norm(x, branch, weight, bias, eps=1e-5, dtype=dtype)


def once(f, leaves, upstream, dtype):
    out = f(*leaves, dtype)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad(out, wanted, upstream)


def cases(device: str) -> Iterator[Case]:
    compiled = torch.compile(by_torch, dynamic=True)
    for norm in ("rms", "layer"):
        for rows, width in SHAPES[device]:
            for dtype in (torch.float32, torch.bfloat16):
                x, branch, up = torch.randn(3, rows, width, device=device)
                weight, bias = torch.rand(2, width, device=device)
                upstream = (up, up.to(dtype))
                leaves = [x, branch.to(dtype), weight, bias if norm == "layer" else None]
                leaves = [None if t is None else t.requires_grad_() for t in leaves]
                rivals = {"ours": ours, "torch": by_torch, "torch.compile": compiled}
                yield Case(
                    f"{norm} {rows} x {width}",
                    str(dtype).removeprefix("torch."),
                    "fwd+bwd",
                    {
                        n: lambda f=f, a=leaves, u=upstream, d=dtype: once(f, a, u, d)
                        for n, f in rivals.items()
                    },
                    # forward: read x and branch, write total and y; backward: read total and the
                    # gradients of total and y, write those of x and, if it is another, of branch
                    bytes=rows
                    * width
                    * (4.0 * 5 + dtype.itemsize * (4 if dtype.itemsize < 4 else 3)),
                )
