"""ppo_loss: clipped policy and value losses, entropy bonus and KL term, with statistics."""

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
    differentiable_once,
    plain_float,
    register,
)

STATISTICS = (
    "count",  # unmasked tokens
    "policy_loss",  # times weights, before coefficients
    "value_loss",  # before value_coef
    "entropy",
    "kl",  # k3 against ref_logprobs
    "approx_kl",  # k2 against old_logprobs: (logprob - old)^2 / 2
    "ratio",
    "clipped",  # tokens whose policy loss is the clipped one
    "value_clipped",  # tokens whose value loss is the clipped one
    "returns",
    "returns_squared",
    "error",  # returns - values
    "error_squared",
)


class PPOStats(NamedTuple):
    """Sums over the unmasked tokens, on the device: those of micro-batches and ranks add up."""

    sums: Tensor  # float32 (len(STATISTICS),)

    def total(self, name: str) -> Tensor:
        """One of STATISTICS: its sum, a 0-d tensor on the device."""
        return self.sums[STATISTICS.index(name)]

    def means(self) -> dict[str, float]:
        """One transfer to the host: every sum over the count, and `explained_variance`."""
        count, *sums = self.sums.tolist()
        mean = {name: s / max(count, 1.0) for name, s in zip(STATISTICS[1:], sums, strict=True)}
        spread = mean["returns_squared"] - mean["returns"] ** 2
        unexplained = mean["error_squared"] - mean["error"] ** 2
        mean["explained_variance"] = 1.0 - unexplained / spread if spread > 0 else float("nan")
        mean["count"] = count
        return mean


def ppo_loss_reference(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    value_clip_range: float | None = 0.2,
    value_coef: float = 0.1,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    aggregate: str = "token",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, PPOStats]:
    """The specification, in the inputs' dtype, differentiable by autograd."""
    zeros = torch.zeros_like(logprobs)
    if aggregate == "sequence" and cu_seqlens is not None:  # what is in no row does not count
        ends = cu_seqlens.tolist()
        at = torch.arange(len(mask), device=mask.device)
        mask = mask & (at >= ends[0]) & (at < ends[-1])

    def kept(x: Tensor) -> Tensor:  # masked entries may hold anything
        return torch.where(mask, x, torch.zeros_like(x))

    logprob, old, advantage = kept(logprobs), kept(old_logprobs), kept(advantages)
    log_ratio = (logprob - old).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    high = clip_range if clip_range_high is None else clip_range_high
    plain = -ratio * advantage
    clipped = -ratio.clamp(1.0 - clip_range, 1.0 + high) * advantage
    policy = torch.maximum(plain, clipped)
    if dual_clip is not None:
        policy = torch.where(advantage < 0, torch.minimum(policy, -dual_clip * advantage), policy)
    if weights is not None:
        policy = policy * kept(weights)
    loss = policy
    value_loss, value_clipped, error, target = zeros, zeros.bool(), zeros, zeros
    if values is not None:
        value, target = kept(values), kept(returns)
        error = target - value
        value_loss = 0.5 * error**2
        if value_clip_range is not None:
            before = kept(old_values)
            step = value - before
            near = before + step.clamp(-value_clip_range, value_clip_range)
            near_loss = torch.where(step.abs() > value_clip_range, 0.5 * (near - target) ** 2, 0.0)
            value_clipped = near_loss > value_loss
            value_loss = torch.maximum(value_loss, near_loss)
        loss = loss + value_coef * value_loss
    bonus = zeros if entropy is None else kept(entropy)
    loss = loss - entropy_coef * bonus
    kl = zeros
    if ref_logprobs is not None:
        d = kept(ref_logprobs) - logprob
        kl = d.exp() - 1.0 - d
        loss = loss + kl_coef * kl

    weight, total = mask.to(loss.dtype), mask.sum()
    if aggregate == "sequence":
        if cu_seqlens is None:
            counts = mask.sum(-1, keepdim=True).expand_as(mask)
            total = mask.any(-1).sum()
        else:
            counts, total = torch.zeros_like(mask, dtype=torch.int64), 0 * total
            for a, b in zip(ends, ends[1:], strict=False):
                counts[a:b] = mask[a:b].sum()
                total = total + mask[a:b].any()
        weight = weight / counts.clamp(min=1)
    if normalizer is None:
        normalizer = total.clamp(min=1)
    result = (kept(loss) * weight).sum() / normalizer
    sums = {
        "count": mask,
        "policy_loss": policy,
        "value_loss": value_loss,
        "entropy": bonus,
        "kl": kl,
        "approx_kl": 0.5 * log_ratio**2,
        "ratio": kept(ratio),
        "clipped": mask & (clipped > plain),
        "value_clipped": value_clipped,
        "returns": target,
        "returns_squared": target**2,
        "error": error,
        "error_squared": error**2,
    }
    stats = torch.stack([sums[name].detach().sum().to(loss.dtype) for name in STATISTICS])
    return result, PPOStats(stats)


SEGMENT = 2048  # tokens whose sums are formed together, unless they are a row's


def _allocate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: Tensor | None,
    by_sequence: bool,
    ratio_low: float,
    ratio_high: float,
    dual_clip: float,
    value_clip_range: float,
    value_coef: float,
    entropy_coef: float,
    kl_coef: float,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "ppo_loss"
    floats = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "values": values,
        "old_values": old_values,
        "returns": returns,
        "entropy": entropy,
        "ref_logprobs": ref_logprobs,
        "weights": weights,
    }
    check_float(op, logprobs=logprobs, **floats)
    check_dtype(op, torch.bool, mask=mask)
    check_dtype(op, torch.int32, cu_seqlens=cu_seqlens)
    if logprobs.ndim not in (1, 2):
        raise ValueError(f"{op}: logprobs must be (B, T) or (N,), got {tuple(logprobs.shape)}")
    check_shape(op, logprobs.shape, mask=mask, **floats)
    if values is not None and returns is None:
        raise ValueError(f"{op}: values need returns, got None")
    if values is not None and value_clip_range >= 0 and old_values is None:
        raise ValueError(f"{op}: a value_clip_range needs old_values, got None")
    if by_sequence and logprobs.ndim == 1 and cu_seqlens is None:
        raise ValueError(f'{op}: aggregate="sequence" on packed (N,) needs cu_seqlens, got None')
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1):
        raise ValueError(f"{op}: cu_seqlens must be (B + 1,), got {tuple(cu_seqlens.shape)}")
    check_shape(op, (), normalizer=normalizer)
    check_device(op, logprobs, mask=mask, cu_seqlens=cu_seqlens, normalizer=normalizer, **floats)

    def scratch(*shape: int) -> Tensor:
        return logprobs.new_empty(shape, dtype=torch.float32)

    def gradient(of: Tensor | None) -> Tensor:
        return scratch(*logprobs.shape) if gradients and of is not None else scratch(0)

    return (
        scratch(),
        scratch(len(STATISTICS)),
        gradient(logprobs),
        gradient(values),
        gradient(entropy),
    )


def _run(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    values,
    old_values,
    returns,
    entropy,
    ref_logprobs,
    weights,
    cu_seqlens,
    normalizer,
    by_sequence,
    *settings,
):
    rows = (values, old_values, returns, entropy, ref_logprobs, weights)
    loss, sums, *gradients = _allocate(
        *(logprobs, old_logprobs, advantages, mask, *rows, cu_seqlens, normalizer, by_sequence),
        *settings,
    )
    tokens = logprobs.numel()
    if not by_sequence:
        segment_tokens, segments, rows_at = SEGMENT, -(-tokens // SEGMENT), None
    elif cu_seqlens is None:
        segment_tokens, segments, rows_at = logprobs.shape[1], logprobs.shape[0], None
    else:
        segment_tokens, segments, rows_at = 0, cu_seqlens.shape[0] - 1, cu_seqlens.contiguous()
    _C.ppo_loss(
        plain_float(logprobs),
        plain_float(old_logprobs),
        plain_float(advantages),
        mask.contiguous(),
        *(None if x is None else plain_float(x) for x in rows),
        rows_at,
        normalizer,
        loss,
        sums,
        *(g if g.shape == logprobs.shape else None for g in gradients),
        logprobs.new_empty(
            _C.ppo_loss_workspace(logprobs, segments, by_sequence), dtype=torch.float64
        ),
        segments,
        segment_tokens,
        by_sequence,
        *settings[:-1],
        torch.get_num_threads(),
    )
    return (loss, sums, *gradients)


_ppo_loss = register(
    "ppo_loss",
    "(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? values, "
    "Tensor? old_values, Tensor? returns, Tensor? entropy, Tensor? ref_logprobs, Tensor? weights, "
    "Tensor? cu_seqlens, Tensor? normalizer, bool by_sequence, float ratio_low, "
    "float ratio_high, float dual_clip, float value_clip_range, float value_coef, "
    "float entropy_coef, float kl_coef, bool gradients) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _allocate,
    _run,
    devices=("cpu", "cuda"),
)


class _PPOLoss(torch.autograd.Function):
    """The forward forms the gradients of the scalar loss; the backward scales them."""

    @staticmethod
    def forward(ctx, logprobs, values, entropy, others, settings):
        old_logprobs, advantages, mask, old_values, returns, *rest = others
        loss, sums, *gradients = _ppo_loss(
            *(logprobs, old_logprobs, advantages, mask, values, old_values, returns, entropy),
            *(*rest, *settings, True),
        )
        mark = loss.new_empty(0)
        ctx.save_for_backward(*gradients, mark)
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if x is None else x.dtype for x in (logprobs, values, entropy)]
        ctx.mark_non_differentiable(sums)
        return loss, sums, mark

    @staticmethod
    @differentiable_once("ppo_loss")
    def backward(ctx, grad_loss, *_):
        *gradients, _ = ctx.saved_tensors
        scaled = [
            None if dtype is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    value_clip_range: float | None = 0.2,
    value_coef: float = 0.1,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    aggregate: str = "token",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, PPOStats]:
    """PPO's clipped policy and value losses, entropy bonus and KL term, with their statistics.

    With d = clamp(logprob - old, +-20) and rho = exp(d), over the unmasked tokens::

        policy = max(-rho A, -clip(rho, 1 - clip_range, 1 + clip_range_high) A)
                 where A < 0 at most -dual_clip A; times weights
        value  = max((v - R)^2, (old_v + clip(v - old_v, +-value_clip_range) - R)^2) / 2
        kl     = exp(ref - logprob) - 1 - (ref - logprob)
        loss   = sum w (policy + value_coef value - entropy_coef entropy + kl_coef kl) / normalizer

    Args:
        logprobs: (B, T) or packed (N,), of the sampled tokens by the policy in training, nats.
            Differentiable.
        old_logprobs: the same by the policy that sampled.
        advantages: as from `ppo_advantage`.
        mask: bool, True on response tokens. What masked tokens hold is not looked at.
        values: the critic's; None: no value loss (GRPO, RLOO, REINFORCE++). Differentiable.
        old_values, returns: as from the rollout; needed with `values`.
        entropy: of the policy's distribution at each token, nats. Differentiable.
        ref_logprobs: of the frozen reference, for `kl_coef`.
        weights: factor of each token's policy loss (importance correction).
        cu_seqlens: int32 (B + 1,), the rows of a packed (N,), for aggregate="sequence": what is in
            no row does not count.
        clip_range, clip_range_high: above 0 (0.2); the upper one where it differs (0.28).
        dual_clip: bound of the loss where A < 0, above 1 (3 as a rule); None: none.
        value_clip_range: above 0 (0.2); None: the plain squared error.
        value_coef, entropy_coef, kl_coef: weights of the terms.
        aggregate: "token": w = 1, normalizer by default the unmasked tokens; "sequence": w = 1 /
            (unmasked tokens of the row), by default the non-empty rows; "constant": w = 1,
            `normalizer` required.
        normalizer: float or 0-d tensor, that of the GLOBAL minibatch, so that micro-batches and
            ranks add up.

    Returns:
        (loss, stats): loss float32, 0-d; stats a PPOStats of sums on the device. Nothing unmasked:
            loss 0, gradients 0. Gradients flow to logprobs, values and entropy only, once.

    Raises:
        TypeError, ValueError: an element type, shape or device is not the documented one, `values`
            without `returns` or `old_values`, an unknown aggregate, "constant" without normalizer,
            a setting that is out of its range.

    Numerics: float32, sums in float64 in a fixed order: the same bits for any number of threads.

    Source: Schulman et al. 2017, arXiv:1707.06347, equation 7; dual clip: Ye et al. 2020,
    arXiv:1912.09729; k3: Schulman 2020, "Approximating KL divergence".
    """
    if aggregate not in ("token", "sequence", "constant"):
        raise ValueError(
            f'ppo_loss: aggregate must be "token", "sequence" or "constant", got {aggregate!r}'
        )
    if aggregate == "constant" and normalizer is None:
        raise ValueError('ppo_loss: aggregate="constant" needs a normalizer, got None')
    ranges = (
        ("clip_range", clip_range, 0),
        ("clip_range_high", clip_range_high, 0),
        ("dual_clip", dual_clip, 1),
        ("value_clip_range", value_clip_range, 0),
    )
    for name, value, least in ranges:
        if value is not None and not value > least:
            raise ValueError(f"ppo_loss: {name} must be above {least}, got {value}")
    if normalizer is not None:
        normalizer = torch.as_tensor(normalizer, dtype=torch.float32, device=logprobs.device)
    settings = (
        aggregate == "sequence",
        1.0 - clip_range,
        1.0 + (clip_range if clip_range_high is None else clip_range_high),
        -1.0 if dual_clip is None else float(dual_clip),
        -1.0 if value_clip_range is None else float(value_clip_range),
        float(value_coef),
        float(entropy_coef),
        float(kl_coef),
    )
    differentiable = [x for x in (logprobs, values, entropy) if x is not None and x.requires_grad]
    if torch.is_grad_enabled() and differentiable:
        others = (old_logprobs, advantages, mask, old_values, returns)
        others = (*others, ref_logprobs, weights, cu_seqlens, normalizer)
        loss, sums, _ = _PPOLoss.apply(logprobs, values, entropy, others, settings)
    else:
        loss, sums, *_ = _ppo_loss(
            *(logprobs, old_logprobs, advantages, mask, values, old_values, returns, entropy),
            *(ref_logprobs, weights, cu_seqlens, normalizer, *settings, False),
        )
    return loss, PPOStats(sums)
