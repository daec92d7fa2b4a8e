"""cross_entropy, forward and backward into a fresh gradient, against F.cross_entropy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from bench import Case, liger

from instructcore.ops import cross_entropy

SHAPES = {
    "cpu": ((1024, 32000), (512, 50257), (512, 50304), (256, 151936), (4000, 259)),
    "cuda": ((8192, 50257), (8192, 151936), (8192, 32000)),
}


def step(loss_of, logits, targets):
    logits.grad = None
    loss_of(logits, targets).backward()


def cases(device: str) -> Iterator[Case]:
    compiled = torch.compile(F.cross_entropy, dynamic=True)
    for rows, vocab in SHAPES[device]:
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(rows, vocab, device=device).to(dtype).requires_grad_()
            targets = torch.randint(0, vocab, (rows,), device=device)
            losses = {
                "ours": cross_entropy,
                "F.cross_entropy": F.cross_entropy,
                "torch.compile": compiled,
            }
            variants = {
                k: lambda f=f, x=logits, t=targets: step(f, x, t) for k, f in losses.items()
            }
            if f := liger("liger_cross_entropy"):  # which overwrites its logits
                own = logits.detach().clone().requires_grad_()
                variants["Liger"] = lambda f=f, x=own, t=targets: step(f, x, t)
            yield Case(
                f"{rows} x {vocab}",
                str(dtype).removeprefix("torch."),
                "fwd+bwd",
                variants,
                # read the logits, write the gradient
                bytes=2.0 * rows * vocab * dtype.itemsize,
            )
