"""linear_cross_entropy, forward and backward, against head and loss apart and the bare GEMMs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from bench import Case, liger

from instructcore.ops import linear_cross_entropy

SHAPES = {
    "cpu": ((768, 259, 128), (2048, 4096, 256), (4000, 8192, 256), (1024, 32000, 512)),
    "cuda": ((8192, 32000, 4096), (8192, 131072, 4096)),
}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


def in_torch(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def step(loss_of, hidden, weight, targets):
    hidden.grad = weight.grad = None
    loss_of(hidden, weight, targets).backward()


def gemms(hidden, weight, grad):
    """Logits, and the gradients of hidden and weight, in the tensors' own type."""
    return torch.mm(hidden, weight.t()), torch.mm(grad, weight), torch.mm(grad.t(), hidden)


def cases(device: str) -> Iterator[Case]:
    compiled = torch.compile(in_torch, dynamic=True)
    for rows, vocab, channels in SHAPES[device]:
        for dtype in DTYPES[device]:
            hidden = torch.randn(rows, channels, device=device).to(dtype)
            weight = (torch.randn(vocab, channels, device=device) / channels**0.5).to(dtype)
            targets = torch.randint(0, vocab, (rows,), device=device)
            grad = torch.randn(rows, vocab, device=device).to(dtype)
            losses = {"ours": linear_cross_entropy, "torch": in_torch, "torch.compile": compiled}
            if f := liger("liger_fused_linear_cross_entropy"):
                losses["Liger"] = f
            leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            variants = {k: lambda f=f, a=(*leaves, targets): step(f, *a) for k, f in losses.items()}
            variants["floor: three GEMMs alone"] = lambda a=(hidden, weight, grad): gemms(*a)
            yield Case(
                f"{rows} x {vocab} x {channels}",
                str(dtype).removeprefix("torch."),
                "fwd+bwd",
                variants,
                flops=6.0 * rows * vocab * channels,
            )
