"""ppo_loss against the same formula in plain and in compiled torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench import Case

from instructcore.ops import ppo_loss, ppo_loss_reference

SHAPES = {"cpu": ((32, 40), (64, 1024)), "cuda": ((64, 1024), (4096, 1024))}


def cases(device: str) -> Iterator[Case]:
    for rows, steps in SHAPES[device]:
        compiled = torch.compile(ppo_loss_reference, dynamic=False)
        shape = (rows, steps)
        logprobs, old, advantages, values, old_values, returns = torch.randn(6, *shape).to(device)
        mask = torch.rand(shape, device=device) > 0.2
        leaves = [x.clone().requires_grad_() for x in (logprobs, values)]

        def run(f, old=old, advantages=advantages, mask=mask, leaves=leaves, rest=None):
            loss, _ = f(
                leaves[0],
                old,
                advantages,
                mask,
                values=leaves[1],
                old_values=rest[0],
                returns=rest[1],
            )
            return torch.autograd.grad(loss, leaves)

        rest = (old_values, returns)
        variants = {
            "ours": lambda run=run, rest=rest: run(ppo_loss, rest=rest),
            "torch": lambda run=run, rest=rest: run(ppo_loss_reference, rest=rest),
            "torch.compile": lambda run=run, f=compiled, rest=rest: run(f, rest=rest),
        }
        # read 6 floats and a byte, write 2 gradients: 33 bytes a token
        yield Case(f"{rows} x {steps}", "float32", "fwd+bwd", variants, bytes=33.0 * rows * steps)
