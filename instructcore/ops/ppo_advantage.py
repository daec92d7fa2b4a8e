"""ppo_advantage: rewards from scores and KL, GAE and whitening; whiten_advantages."""

from __future__ import annotations

from typing import NamedTuple

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
from .gae import gae_reference


class PPOTargets(NamedTuple):
    """What PPO learns from: float32, of logprobs' shape, 0 at masked steps; stats is (3,)."""

    advantages: Tensor  # whitened if asked
    returns: Tensor  # un-whitened advantages + values
    rewards: Tensor  # as GAE took them: KL penalty and score, whitened if asked
    stats: Tensor  # float32 (count, mean, M2) of the un-whitened advantages; var = M2 / count


def _moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count = mask.sum().to(x.dtype)
    kept = torch.where(mask, x, torch.zeros_like(x))
    mean = kept.sum() / count.clamp(min=1)
    m2 = torch.where(mask, (x - mean) ** 2, torch.zeros_like(x)).sum()
    return count, mean, m2


def whiten_advantages_reference(
    advantages: Tensor, mask: Tensor | None, mean: Tensor | float, var: Tensor | float
) -> Tensor:
    whitened = (advantages - mean) * torch.rsqrt(torch.as_tensor(var + 1e-8))
    return whitened if mask is None else torch.where(mask, whitened, torch.zeros_like(whitened))


def ppo_advantage_reference(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    gamma: float,
    lambda_: float,
    score_index: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap: Tensor | None = None,
    reward_clip: float | None = None,
    whiten_rewards: bool = False,
    whiten: bool = True,
    unbiased: bool = False,
) -> PPOTargets:
    """The specification, in the inputs' dtype."""
    zeros = torch.zeros_like(logprobs)
    rewards = torch.where(mask, -kl_coef * (logprobs - ref_logprobs), zeros)
    paid = scores if reward_clip is None else scores.clamp(-reward_clip, reward_clip)
    if cu_seqlens is None:
        rows = [((b,), 0, logprobs.shape[1]) for b in range(logprobs.shape[0])]
    else:
        ends = cu_seqlens.tolist()
        rows = [((), first, last) for first, last in zip(ends, ends[1:], strict=False)]
    for b, (row, first, last) in enumerate(rows):
        if score_index is None:
            unmasked = mask[row][first:last].nonzero()
            at = first + int(unmasked[-1]) if len(unmasked) else None
        else:
            at = first + int(score_index[b]) if score_index[b] >= 0 else None
        if at is not None and at < last and mask[(*row, at)]:
            rewards[(*row, at)] += paid[b]

    def scaled(x: Tensor, keep_mean: bool) -> tuple[Tensor, Tensor]:
        count, mean, m2 = _moments(x, mask)
        stats = torch.stack([count, mean, m2])
        if count <= 1:
            return x, stats
        var = m2 / (count - 1 if unbiased else count)
        white = whiten_advantages_reference(x, mask, mean, var)
        return torch.where(mask, white + mean, zeros) if keep_mean else white, stats

    if whiten_rewards:
        rewards, _ = scaled(rewards, keep_mean=True)
    advantages, returns = gae_reference(
        rewards,
        values,
        mask,
        gamma=gamma,
        lambda_=lambda_,
        cu_seqlens=cu_seqlens,
        dones=dones,
        bootstrap=bootstrap,
    )
    white, stats = scaled(advantages, keep_mean=False)
    return PPOTargets(white if whiten else advantages, returns, rewards, stats)


def _allocate(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    score_index: Tensor | None,
    cu_seqlens: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    kl_coef: float,
    gamma: float,
    lambda_: float,
    reward_clip: float,
    whiten_rewards: bool,
    whiten: bool,
    unbiased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "ppo_advantage"
    floats = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values}
    check_float(op, scores=scores, bootstrap=bootstrap, **floats)
    check_dtype(op, torch.bool, mask=mask, dones=dones)
    check_dtype(op, torch.int64, score_index=score_index)
    check_dtype(op, torch.int32, cu_seqlens=cu_seqlens)
    ndim, layout = (2, "(B, T)") if cu_seqlens is None else (1, "(N,) with cu_seqlens")
    if logprobs.ndim != ndim:
        raise ValueError(f"{op}: logprobs must be {layout}, got {tuple(logprobs.shape)}")
    check_shape(
        op, logprobs.shape, ref_logprobs=ref_logprobs, values=values, mask=mask, dones=dones
    )
    rows = logprobs.shape[0]
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"{op}: cu_seqlens must be (B + 1,), got {tuple(cu_seqlens.shape)}")
        rows = cu_seqlens.shape[0] - 1
    check_shape(op, (rows,), scores=scores, score_index=score_index, bootstrap=bootstrap)
    others = {"score_index": score_index, "cu_seqlens": cu_seqlens, "dones": dones}
    check_device(op, logprobs, scores=scores, mask=mask, bootstrap=bootstrap, **floats, **others)
    outputs = [logprobs.new_empty(logprobs.shape, dtype=torch.float32) for _ in range(3)]
    return (*outputs, logprobs.new_empty(3, dtype=torch.float32))


def _run(scores, logprobs, ref_logprobs, values, mask, score_index, cu_seqlens, *rest):
    advantages, returns, rewards, stats = _allocate(
        scores, logprobs, ref_logprobs, values, mask, score_index, cu_seqlens, *rest
    )
    dones, bootstrap, *settings = rest
    _C.ppo_advantage(
        plain_float(scores),
        plain_float(logprobs),
        plain_float(ref_logprobs),
        plain_float(values),
        mask.contiguous(),
        None if score_index is None else score_index.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        None if dones is None else dones.contiguous(),
        None if bootstrap is None else plain_float(bootstrap),
        advantages,
        returns,
        rewards,
        stats,
        scores.new_empty(_C.ppo_advantage_workspace(logprobs, cu_seqlens), dtype=torch.uint8),
        *settings,
        torch.get_num_threads(),
    )
    return advantages, returns, rewards, stats


_ppo_advantage = register(
    "ppo_advantage",
    "(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask, "
    "Tensor? score_index, Tensor? cu_seqlens, Tensor? dones, Tensor? bootstrap, float kl_coef, "
    "float gamma, float lambda_, float reward_clip, bool whiten_rewards, bool whiten, "
    "bool unbiased) -> (Tensor, Tensor, Tensor, Tensor)",
    _allocate,
    _run,
    devices=("cpu", "cuda"),
)


@torch.no_grad()
def ppo_advantage(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    gamma: float,
    lambda_: float,
    score_index: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap: Tensor | None = None,
    reward_clip: float | None = None,
    whiten_rewards: bool = False,
    whiten: bool = True,
    unbiased: bool = False,
) -> PPOTargets:
    """From scores to PPO's targets: per-token rewards, GAE, whitening.

    rewards[t] = -kl_coef (logprobs[t] - ref_logprobs[t]) on unmasked steps, plus the score, clamped
    to +-reward_clip, at score_index. Then `gae`, whose masking rules hold here too. Whitening is
    (x - mean) rsqrt(var + 1e-8) over the unmasked steps of the whole batch; rewards keep their
    mean. With one unmasked step or none, nothing is whitened.

    Args:
        scores: (B,), of the reward model or function, one for each row.
        logprobs: (B, T), or (N,) with `cu_seqlens`, of the sampled tokens by the policy that
            sampled them, nats.
        ref_logprobs: the same by the frozen reference.
        values: the critic's, of the state before each token.
        mask: bool, True on response tokens. What masked steps hold is not looked at.
        kl_coef: weight of the KL penalty (0.02 in InstructGPT).
        gamma, lambda_: as for `gae` (1 and 0.95).
        score_index: int64 (B,): the step within the row at which the score is paid, -1 for none;
            default the last unmasked one. A score at a masked step, or of a row without unmasked
            steps, is not paid.
        cu_seqlens, dones, bootstrap: as for `gae`.
        reward_clip: bound of the scores' magnitude; None: unbounded.
        whiten_rewards, whiten: whiten the rewards (keeping their mean), the advantages.
        unbiased: divide by count - 1 in the variance, as TRL does.

    Returns:
        PPOTargets(advantages, returns, rewards, stats). returns are un-whitened advantages +
        values; stats is (count, mean, M2) of the un-whitened advantages: over several ranks call
        with whiten=False, merge the stats, then `whiten_advantages`.

    Raises:
        TypeError, ValueError: an element type, shape or device is not the documented one.

    Numerics: float32, GAE as `gae`; moments in float64, merged in the order of the rows (on CUDA of
    their tiles): the same bits from run to run and for any number of threads.

    Source: Ouyang et al. 2022, arXiv:2203.02155, section 3.5; Huang et al. 2024, arXiv:2403.17031.
    """
    if reward_clip is not None and not reward_clip >= 0:
        raise ValueError(f"ppo_advantage: reward_clip must be at least 0, got {reward_clip}")
    return PPOTargets(
        *_ppo_advantage(
            scores,
            logprobs,
            ref_logprobs,
            values,
            mask,
            score_index,
            cu_seqlens,
            dones,
            bootstrap,
            float(kl_coef),
            float(gamma),
            float(lambda_),
            -1.0 if reward_clip is None else float(reward_clip),
            whiten_rewards,
            whiten,
            unbiased,
        )
    )


def _allocate_whiten(advantages: Tensor, mask: Tensor | None, mean: Tensor, var: Tensor) -> Tensor:
    op = "whiten_advantages"
    check_float(op, advantages=advantages)
    check_dtype(op, torch.bool, mask=mask)
    check_shape(op, advantages.shape, mask=mask)
    check_shape(op, (), mean=mean, var=var)
    check_device(op, advantages, mask=mask, mean=mean, var=var)
    return advantages.new_empty(advantages.shape, dtype=torch.float32)


def _run_whiten(advantages, mask, mean, var):
    out = _allocate_whiten(advantages, mask, mean, var)
    _C.whiten_advantages(
        plain_float(advantages),
        None if mask is None else mask.contiguous(),
        mean.float(),
        var.float(),
        out,
        torch.get_num_threads(),
    )
    return out


_whiten_advantages = register(
    "whiten_advantages",
    "(Tensor advantages, Tensor? mask, Tensor mean, Tensor var) -> Tensor",
    _allocate_whiten,
    _run_whiten,
    devices=("cpu", "cuda"),
)


@torch.no_grad()
def whiten_advantages(
    advantages: Tensor, mask: Tensor | None, mean: Tensor | float, var: Tensor | float
) -> Tensor:
    """(advantages - mean) rsqrt(var + 1e-8) on unmasked steps, 0 on masked ones.

    Args:
        advantages: any shape.
        mask: bool, of advantages' shape; None: nothing is masked.
        mean, var: floats or 0-d tensors, as merged over ranks from PPOTargets.stats.

    Returns:
        float32, of advantages' shape, without gradient.

    Raises:
        TypeError, ValueError: an element type, shape or device is not the documented one.

    Source: Huang et al. 2024, arXiv:2403.17031, on whitening over all ranks.
    """
    like = {"dtype": torch.float32, "device": advantages.device}
    return _whiten_advantages(
        advantages, mask, torch.as_tensor(mean, **like), torch.as_tensor(var, **like)
    )
