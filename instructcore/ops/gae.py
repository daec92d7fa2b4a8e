"""gae: generalized advantage estimation over padded or packed rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import (
    _C,
    check_device,
    check_dtype,
    check_float,
    check_shape,
    plain_float,
    register,
)


def gae_reference(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float,
    lambda_: float,
    cu_seqlens: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification, in the inputs' dtype."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    if cu_seqlens is None:
        rows = [((b,), 0, rewards.shape[1]) for b in range(rewards.shape[0])]
    else:
        ends = cu_seqlens.tolist()
        rows = [((), first, last) for first, last in zip(ends, ends[1:], strict=False)]
    for b, (row, first, last) in enumerate(rows):
        next_value = rewards.new_zeros(()) if bootstrap is None else bootstrap[b].to(rewards.dtype)
        advantage = rewards.new_zeros(())
        for t in reversed(range(first, last)):
            at = (*row, t)
            if dones is not None and dones[at]:
                next_value, advantage = rewards.new_zeros(()), rewards.new_zeros(())
            if mask is not None and not mask[at]:
                continue
            delta = rewards[at] + gamma * next_value - values[at]
            advantage = delta + gamma * lambda_ * advantage
            next_value = values[at]
            advantages[at], returns[at] = advantage, advantage + values[at]
    return advantages, returns


def _allocate(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lambda_: float,
) -> tuple[Tensor, Tensor]:
    check_float("gae", rewards=rewards, values=values, bootstrap=bootstrap)
    check_dtype("gae", torch.bool, mask=mask, dones=dones)
    check_dtype("gae", torch.int32, cu_seqlens=cu_seqlens)
    ndim, layout = (2, "(B, T)") if cu_seqlens is None else (1, "(N,) with cu_seqlens")
    if rewards.ndim != ndim:
        raise ValueError(f"gae: rewards must be {layout}, got {tuple(rewards.shape)}")
    check_shape("gae", rewards.shape, values=values, mask=mask, dones=dones)
    rows = rewards.shape[0]
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"gae: cu_seqlens must be (B + 1,), got {tuple(cu_seqlens.shape)}")
        rows = cu_seqlens.shape[0] - 1
    check_shape("gae", (rows,), bootstrap=bootstrap)
    check_device(
        "gae",
        rewards,
        values=values,
        mask=mask,
        dones=dones,
        cu_seqlens=cu_seqlens,
        bootstrap=bootstrap,
    )
    shape = rewards.shape
    return (
        rewards.new_empty(shape, dtype=torch.float32),
        rewards.new_empty(shape, dtype=torch.float32),
    )


def _run(rewards, values, mask, cu_seqlens, dones, bootstrap, gamma, lambda_):
    advantages, returns = _allocate(
        rewards, values, mask, cu_seqlens, dones, bootstrap, gamma, lambda_
    )
    size = _C.gae_workspace(rewards, cu_seqlens)
    _C.gae(
        rewards,
        values,
        mask,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        dones,
        None if bootstrap is None else plain_float(bootstrap),
        advantages,
        returns,
        rewards.new_empty(size, dtype=torch.uint8) if size else None,
        gamma,
        lambda_,
        torch.get_num_threads(),
    )
    return advantages, returns


_gae = register(
    "gae",
    "(Tensor rewards, Tensor values, Tensor? mask, Tensor? cu_seqlens, Tensor? dones, "
    "Tensor? bootstrap, float gamma, float lambda_) -> (Tensor, Tensor)",
    _allocate,
    _run,
    devices=("cpu", "cuda"),
)


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float,
    lambda_: float,
    cu_seqlens: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates and returns, each row backwards in time.

    With a state (V', A') that starts at (bootstrap or 0, 0), for t from the last step to the
    first::

        dones[t]:   (V', A') = (0, 0)
        unmasked t: A = r[t] + gamma V' - V[t] + gamma lambda A'
                    advantages[t] = A, returns[t] = A + V[t], (V', A') = (V[t], A)
        masked t:   both outputs 0; the state passes through, undiscounted

    So padding on either side is inert, `bootstrap` reaches the last unmasked step, and masked steps
    between (observation tokens) carry.

    Args:
        rewards: (B, T), or (N,) with `cu_seqlens`; r[t] is paid for step t, 0 <= t < T. Any
            strides.
        values: like rewards; V[t] is the value of the state before step t.
        mask: bool, like rewards: True for a real step. Masked rewards and values may be NaN.
        gamma: discount per step, 0..1 (1 in RLHF).
        lambda_: trace decay, 0..1 (0.95 as a rule).
        cu_seqlens: int32 (B + 1,): row b is steps cu_seqlens[b] .. cu_seqlens[b + 1] - 1 of (N,).
        dones: bool, like rewards: the episode terminates after step t.
        bootstrap: (B,): value of the state after the last step; 0 if None.

    Returns:
        (advantages, returns): float32, of rewards' shape, without gradient.

    Raises:
        TypeError: an element type is not the documented one.
        ValueError: shapes or devices differ.

    Numerics: float32 arithmetic whatever the input type. On the CPU a scan over sixteen steps at
    a time, counted from the last unmasked one, where they are unmasked, none ends an episode and
    they lie side by side, and step by step elsewhere; on CUDA a scan over tiles of the row, counted
    from its end. Either way the same bits from run to run, for any number of threads and whatever
    the other rows.

    Source: Schulman et al. 2015, arXiv:1506.02438, equation 16.
    """
    return _gae(rewards, values, mask, cu_seqlens, dones, bootstrap, float(gamma), float(lambda_))
