"""swiglu and gelu, forward and with gradient, in the shapes of small models' MLPs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench import Case

from instructcore.ops import gelu, gelu_reference, swiglu, swiglu_reference

SHAPES = {"cpu": ((1, 704), (1024, 704), (4096, 3072)), "cuda": ((8192, 11008),)}


def once(f, x, upstream):
    x.grad = None
    f(x).backward(upstream)


def forward(f, x):
    with torch.no_grad():
        return f(x)


def cases(device: str) -> Iterator[Case]:
    for name, ours, plain, halves in (
        ("swiglu", swiglu, swiglu_reference, 2),
        ("gelu", gelu, gelu_reference, 1),
    ):
        compiled = torch.compile(plain, dynamic=True)
        for rows, width in SHAPES[device]:
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(rows, halves * width, device=device).to(dtype)
                leaf = x.clone().requires_grad_()
                upstream = torch.randn(rows, width, device=device).to(dtype)
                rivals = {"ours": ours, "torch": plain, "torch.compile": compiled}
                case = (f"{name} {rows} x {width}", str(dtype).removeprefix("torch."))
                element = rows * width * dtype.itemsize
                yield Case(
                    *case,
                    "fwd",
                    {n: lambda f=f, x=x: forward(f, x) for n, f in rivals.items()},
                    bytes=element * (halves + 1.0),  # read x, write the output
                )
                yield Case(
                    *case,
                    "fwd+bwd",
                    {n: lambda f=f, x=leaf, u=upstream: once(f, x, u) for n, f in rivals.items()},
                    # the forward's, and: read x and the output's gradient, write x's
                    bytes=element * (3.0 * halves + 2.0),
                )
