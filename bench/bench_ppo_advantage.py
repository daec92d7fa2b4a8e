"""ppo_advantage against today's tensor code: rewards, a GAE loop over time, masked whitening.

The rival is not compiled: torch.compile would unroll its loop over time. whiten_advantages, which
has none, is measured against both.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench import Case
from bench_gae import torch_loop

from instructcore.ops import ppo_advantage, whiten_advantages


def whiten_in_torch(advantages, mask, mean, var):
    return torch.where(mask, (advantages - mean) * torch.rsqrt(var + 1e-8), 0.0)


def in_torch(scores, logprobs, ref_logprobs, values, mask, kl_coef, gamma, lambda_):
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    advantages, returns = torch_loop(rewards, values * mask, gamma, lambda_)
    count = mask.sum()
    mean = (advantages * mask).sum() / count
    var = ((advantages - mean) ** 2 * mask).sum() / count
    return (advantages - mean) * torch.rsqrt(var + 1e-8) * mask, returns, rewards


SHAPES = {"cpu": ((128, 40), (512, 1024)), "cuda": ((512, 1024), (4096, 1024))}


def cases(device: str) -> Iterator[Case]:
    for rows, steps in SHAPES[device]:
        scores = torch.randn(rows, device=device)
        logprobs, ref_logprobs, values = torch.randn(3, rows, steps, device=device)
        lengths = torch.randint(1, steps + 1, (rows, 1), device=device)
        mask = torch.arange(steps, device=device) < lengths
        tensors = (scores, logprobs, ref_logprobs, values, mask)
        variants = {
            "ours": lambda t=tensors: ppo_advantage(*t, kl_coef=0.05, gamma=1.0, lambda_=0.95),
            "torch": lambda t=tensors: in_torch(*t, 0.05, 1.0, 0.95),
        }
        # read 3 floats and a byte, write 3 floats; whitening reads and writes one more: 33 bytes
        yield Case(f"{rows} x {steps}", "float32", "fwd", variants, bytes=33.0 * rows * steps)
        mean, var = values[mask].mean(), values[mask].var()
        tensors = (values, mask, mean, var)
        compiled = torch.compile(whiten_in_torch)
        variants = {
            "ours": lambda t=tensors: whiten_advantages(*t),
            "torch": lambda t=tensors: whiten_in_torch(*t),
            "torch.compile": lambda t=tensors, f=compiled: f(*t),
        }
        # read a float and a byte, write a float
        yield Case(f"whiten {rows} x {steps}", "float32", "fwd", variants, bytes=9.0 * rows * steps)
