"""rotary on the queries, keys and values of one projection, forward and with gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench import Case

from instructcore.ops import rotary, rotary_reference

SHAPES = {"cpu": ((1, 8, 64), (1024, 12, 64), (4096, 12, 128)), "cuda": ((8192, 48, 128),)}


def complex_product(x, cos, sin, positions, *, heads):
    """As Llama's own code has it."""
    turn = torch.complex(cos[positions], sin[positions]).unsqueeze(1)
    pairs = torch.view_as_complex(x[:, :heads].float().unflatten(-1, (-1, 2)))
    return torch.cat((torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype), x[:, heads:]), 1)


def once(f, x, upstream, *arguments, **options):
    x.grad = None
    f(x, *arguments, **options).backward(upstream)


def forward(f, *arguments, **options):
    with torch.no_grad():
        return f(*arguments, **options)


def cases(device: str) -> Iterator[Case]:
    variants = {
        "ours": rotary,
        "torch, complex": complex_product,
        "torch.compile": torch.compile(rotary_reference, dynamic=True),
    }
    for tokens, heads, dim in SHAPES[device]:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(tokens, heads, dim, device=device).to(dtype)
            leaf = x.clone().requires_grad_()
            angles = torch.rand(tokens, dim // 2, device=device)
            tables = angles.cos(), angles.sin(), torch.arange(tokens, device=device).int()
            options = {"heads": heads * 5 // 6}
            case = (f"{tokens} x {heads} x {dim}", str(dtype).removeprefix("torch."))
            moved = 2.0 * x.numel() * dtype.itemsize + 4.0 * tokens * dim  # x, out; cos and sin
            yield Case(
                *case,
                "fwd",
                {
                    n: lambda f=f, a=(x, *tables), o=options: forward(f, *a, **o)
                    for n, f in variants.items()
                },
                bytes=moved,
            )
            yield Case(
                *case,
                "fwd+bwd",
                {
                    n: lambda f=f, x=leaf, a=(x, *tables), o=options: once(f, x, *a, **o)
                    for n, f in variants.items()
                },
                bytes=2 * moved,
            )
