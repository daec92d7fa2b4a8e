"""rotary with its gradient, queries, keys and values of packed tokens, against torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench import Case

from instructcore.ops import rotary, rotary_reference

# tokens, heads, kv_heads, D
SHAPES = {
    "cpu": ((1, 4, 4, 64), (2048, 4, 4, 64), (4096, 12, 4, 64)),
    "cuda": ((8192, 32, 8, 128),),
}


def by_complex(qkv, cos, sin, positions, *, heads, kv_heads):
    """As one product of complex numbers, the quickest form in eager torch."""
    turn = torch.complex(cos[positions], sin[positions]).unsqueeze(1)
    pairs = torch.view_as_complex(qkv[:, : heads + kv_heads].float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * turn).flatten(-2).to(qkv.dtype)
    return turned[:, :heads], turned[:, heads:], qkv[:, heads + kv_heads :]


def once(f, qkv, rest, named, upstream):
    return torch.autograd.grad(f(qkv, *rest, **named), qkv, upstream)


def cases(device: str) -> Iterator[Case]:
    rivals = {"ours": rotary, "torch": rotary_reference, "complex": by_complex}
    rivals["torch.compile"] = torch.compile(rotary_reference, dynamic=True)
    for tokens, heads, kv_heads, dim in SHAPES[device]:
        for dtype in (torch.float32, torch.bfloat16):
            all_heads = heads + 2 * kv_heads
            qkv = torch.randn(tokens, all_heads, dim, device=device).to(dtype).requires_grad_()
            angles = torch.outer(torch.arange(512.0), torch.rand(dim // 2)).to(device)
            positions = (torch.arange(tokens, device=device) % 512).int()
            rest = (angles.cos(), angles.sin(), positions)
            named = {"heads": heads, "kv_heads": kv_heads}
            upstream = [torch.randn_like(x) for x in rotary(qkv, *rest, **named)]
            yield Case(
                f"{tokens} x {heads}/{kv_heads} x {dim}",
                str(dtype).removeprefix("torch."),
                "fwd+bwd",
                {
                    n: lambda f=f, q=qkv, r=rest, k=named, u=upstream: once(f, q, r, k, u)
                    for n, f in rivals.items()
                },
                # read q and k, write them; read the gradients of q, k and v, write that of qkv
                bytes=2.0 * tokens * dim * dtype.itemsize * (heads + kv_heads + all_heads),
            )
