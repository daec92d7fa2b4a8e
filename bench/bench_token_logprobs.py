"""token_logprobs with entropy, forward, against log_softmax, gather and a sum."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench import Case

from instructcore.ops import token_logprobs

SHAPES = {
    "cpu": ((1024, 32000), (512, 50257), (256, 151936), (4000, 259)),
    "cuda": ((8192, 50257), (8192, 151936)),
}


def in_torch(logits, targets):
    logprobs = torch.log_softmax(logits, -1, dtype=torch.float32)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def cases(device: str) -> Iterator[Case]:
    compiled = torch.compile(in_torch, dynamic=True)
    for rows, vocab in SHAPES[device]:
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(rows, vocab, device=device).to(dtype)
            targets = torch.randint(0, vocab, (rows,), device=device)
            functions = {"ours": token_logprobs, "torch": in_torch, "torch.compile": compiled}
            yield Case(
                f"{rows} x {vocab}",
                str(dtype).removeprefix("torch."),
                "fwd",
                {k: lambda f=f, x=logits, t=targets: f(x, t) for k, f in functions.items()},
                # read the logits
                bytes=1.0 * rows * vocab * dtype.itemsize,
            )
