"""linear_token_logprobs with entropy, against head and log_softmax apart and the bare GEMMs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from bench import Case

from instructcore.ops import linear_token_logprobs

SHAPES = {
    "cpu": ((768, 259, 128), (2048, 4096, 256), (1024, 32000, 512)),
    "cuda": ((8192, 32000, 4096), (8192, 131072, 4096)),
}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


def in_torch(hidden, weight, targets):
    logprobs = torch.log_softmax(F.linear(hidden, weight), -1, dtype=torch.float32)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def step(f, hidden, weight, targets):
    hidden.grad = weight.grad = None
    logprobs, entropy, *_ = f(hidden, weight, targets)
    (logprobs.sum() + 0.01 * entropy.sum()).backward()


def forward(f, hidden, weight, targets):
    with torch.no_grad():
        f(hidden, weight, targets)


def gemms(hidden, weight, grad):
    """Logits twice, and the gradients of hidden and weight, in the tensors' own type."""
    torch.mm(hidden, weight.t())
    torch.mm(hidden, weight.t())
    return torch.mm(grad, weight), torch.mm(grad.t(), hidden)


def cases(device: str) -> Iterator[Case]:
    compiled = torch.compile(in_torch, dynamic=True)
    for rows, vocab, channels in SHAPES[device]:
        for dtype in DTYPES[device]:
            hidden = torch.randn(rows, channels, device=device).to(dtype)
            weight = (torch.randn(vocab, channels, device=device) / channels**0.5).to(dtype)
            targets = torch.randint(0, vocab, (rows,), device=device)
            grad = torch.randn(rows, vocab, device=device).to(dtype)
            functions = {
                "ours": linear_token_logprobs,
                "torch": in_torch,
                "torch.compile": compiled,
            }
            leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            product = 2.0 * rows * vocab * channels
            for name, run, count in (("fwd", forward, 1), ("fwd+bwd", step, 4)):
                variants = {
                    k: lambda f=f, run=run, a=(*leaves, targets): run(f, *a)
                    for k, f in functions.items()
                }
                if name == "fwd":
                    variants["floor: GEMM alone"] = lambda h=hidden, w=weight: torch.mm(h, w.t())
                else:
                    variants["floor: four GEMMs alone"] = lambda a=(hidden, weight, grad): gemms(*a)
                yield Case(
                    f"{rows} x {vocab} x {channels}",
                    str(dtype).removeprefix("torch."),
                    name,
                    variants,
                    flops=count * product,
                )
