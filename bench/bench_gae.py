"""gae against the loops that trainers use."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from bench import Case

from instructcore.ops import gae


def torch_loop(rewards, values, gamma, lambda_):
    """The loop over time of most trainers: all rows at once, a few torch calls per step."""
    advantages = torch.empty_like(rewards)
    advantage = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(advantage)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lambda_ * advantage
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages, advantages + values


def numpy_loop(rewards, values, gamma, lambda_):
    """The same on time-major numpy arrays, the fastest plain-Python form on a CPU."""
    advantages = np.empty_like(rewards)
    advantage = np.zeros_like(rewards[0])
    next_value = np.zeros_like(advantage)
    for t in range(len(rewards) - 1, -1, -1):
        advantage = rewards[t] + gamma * next_value - values[t] + gamma * lambda_ * advantage
        advantages[t] = advantage
        next_value = values[t]
    return advantages, advantages + values


SHAPES = {
    "cpu": ((512, 1024), (128, 40), (8, 65536)),
    "cuda": ((512, 1024), (4096, 1024), (256, 131072)),
}


def cases(device: str) -> Iterator[Case]:
    for rows, steps in SHAPES[device]:
        rewards, values = torch.randn(2, rows, steps, device=device)
        variants = {
            "ours": lambda r=rewards, v=values: gae(r, v, gamma=1.0, lambda_=0.95),
        }
        if device == "cpu" or steps <= 1024:  # 25 us a step on a GPU
            variants["torch loop"] = lambda r=rewards, v=values: torch_loop(r, v, 1.0, 0.95)
        if device == "cpu":
            r, v = rewards.T.contiguous().numpy(), values.T.contiguous().numpy()
            variants["numpy loop"] = lambda r=r, v=v: numpy_loop(r, v, 1.0, 0.95)
        # read rewards and values, write advantages and returns: 16 bytes a step
        yield Case(f"{rows} x {steps}", "float32", "fwd", variants, bytes=16.0 * rows * steps)
