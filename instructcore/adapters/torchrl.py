"""torchrl (0.14): generalized advantage estimation, time-major or in any other layout."""

import torch

from instructcore.ops import gae

from . import refuse, replacing


def generalized_advantage_estimate(gamma, lmbda, state_value, next_state_value, reward, done,
                                   terminated=None, *, time_dim=-2):  # fmt: skip
    """All of one shape, time along `time_dim` -> (advantages, value targets), float32.

    A step that is done but not terminated, a truncation, still counts its next state's value.
    """
    ends = (done if terminated is None else terminated).bool()
    tensors = (state_value, next_state_value, reward, done, ends)
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    op, must = "generalized_advantage_estimate", "without gradient, as the results are"
    refuse(op, state_value=(trained and "one that requires it", must))
    refuse(op, gamma=(torch.is_tensor(gamma) and gamma.ndim and gamma, "one number"))
    refuse(op, lmbda=(torch.is_tensor(lmbda) and lmbda.ndim and lmbda, "one number"))
    if len(shapes := {tuple(x.shape) for x in tensors}) > 1:
        raise ValueError(f"{op}: shapes must be one, got {shapes}")
    rest = reward + gamma * next_state_value.masked_fill(ends, 0.0) - state_value
    moved, dones = (x.movedim(time_dim, -1) for x in (rest, done.bool()))
    rows, dones = (x.reshape(-1, moved.shape[-1]) for x in (moved, dones))
    advantages, _ = gae(rows, torch.zeros_like(rows), dones=dones, gamma=gamma, lambda_=lmbda)
    advantages = advantages.view(moved.shape).movedim(-1, time_dim)
    return advantages, advantages + state_value


def vec_generalized_advantage_estimate(gamma, lmbda, state_value, next_state_value, reward, done,
                                       terminated=None, *, time_dim=-2):  # fmt: skip
    """`generalized_advantage_estimate` under torchrl's other name for it."""
    steps = (state_value, next_state_value, reward, done, terminated)
    return generalized_advantage_estimate(gamma, lmbda, *steps, time_dim=time_dim)


_ours = (generalized_advantage_estimate, vec_generalized_advantage_estimate)
use, restore = replacing({"torchrl.objectives.value.functional": _ours})
