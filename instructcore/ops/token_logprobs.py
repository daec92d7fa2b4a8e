"""token_logprobs: log-probability of each target token, entropy, lse and top-1, in one read."""

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
    last_contiguous,
    plain_float,
    register,
    reused_pages,
)


class TokenLogprobs(NamedTuple):
    """Per row, float32 (N,) but `top1`; masked and ignored rows hold 0 and False."""

    logprobs: Tensor  # of the target, <= 0; differentiable
    entropy: Tensor | None  # of the whole row, nats; differentiable; None unless asked for
    lse: Tensor  # log of the sum of exp(logits / temperature)
    top1: Tensor  # bool: the target is the lowest argmax


def token_logprobs_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    entropy: bool = True,
    ignore_index: int = -100,
) -> TokenLogprobs:
    """The specification, in float32 (float64 for float64 logits), differentiable by autograd."""
    vocab = logits.shape[1]
    live = targets != ignore_index
    if mask is not None:
        live = live & mask
    if ((targets < 0) | (targets >= vocab))[live].any():
        raise IndexError(f"token_logprobs: targets must be in [0, {vocab}) or {ignore_index}")
    target = torch.where(live, targets, 0)
    x = logits if logits.dtype == torch.float64 else logits.float()
    x = torch.where(live[:, None], x, 0.0)
    if isinstance(temperature, Tensor):
        temperature = torch.where(live, temperature.to(x.dtype), 1.0)[:, None]
    x = x / temperature
    logprobs = x.log_softmax(-1)
    lse = x.detach().logsumexp(-1)
    top1 = (x.argmax(-1) == target) & ~lse.isnan()
    picked = logprobs.gather(1, target[:, None])[:, 0]
    spread = None
    if entropy:
        p = logprobs.exp()
        spread = -(p * logprobs.masked_fill(p == 0, 0.0)).sum(-1)
        spread = torch.where(live, spread, 0.0)
    return TokenLogprobs(
        torch.where(live, picked, 0.0), spread, torch.where(live, lse, 0.0), top1 & live
    )


def temperature_tensor(
    op: str, temperature: float | Tensor, rows: int, device: torch.device
) -> Tensor:
    """float32, 0-d from a float, which is checked here, else (N,), which the op checks."""
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"{op}: temperature must be above 0, got {temperature}")
        return torch.full((), float(temperature), dtype=torch.float32, device=device)
    check_float(op, temperature=temperature)
    if temperature.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: temperature must not require a gradient, it gets none")
    if temperature.ndim == 0:
        temperature = temperature.expand(rows)
    check_shape(op, (rows,), temperature=temperature)
    return plain_float(temperature)


def check_temperature(
    op: str, temperature: Tensor, targets: Tensor, mask: Tensor | None, ignore_index: int
) -> None:
    """Of the rows that count, on the CPU."""
    live = targets != ignore_index
    temperature = temperature[live if mask is None else live & mask]
    if temperature.numel() and not (lowest := temperature.min().item()) > 0:
        raise ValueError(f"{op}: temperature must be above 0, got {lowest}")


def _allocate(
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    entropy: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "token_logprobs"
    check_float(op, logits=logits)
    check_dtype(op, torch.int64, targets=targets)
    check_dtype(op, torch.float32, temperature=temperature)
    check_dtype(op, torch.bool, mask=mask)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"{op}: logits must be (N, V), V > 0, got {tuple(logits.shape)}")
    rows = logits.shape[0]
    check_shape(op, (rows,), targets=targets, mask=mask)
    check_device(op, logits, targets=targets, temperature=temperature, mask=mask)
    return (
        logits.new_empty((rows,), dtype=torch.float32),
        logits.new_empty((rows if entropy else 0,), dtype=torch.float32),
        logits.new_empty((rows,), dtype=torch.float32),
        logits.new_empty((rows,), dtype=torch.bool),
        logits.new_empty((rows, 2), dtype=torch.float32),
    )


def _run(logits, targets, temperature, mask, entropy, ignore_index):
    """(logprobs, entropy, lse, top1, stats)"""
    outputs = _allocate(logits, targets, temperature, mask, entropy, ignore_index)
    logprobs, spread, lse, top1, stats = outputs
    op, vocab = "token_logprobs", logits.shape[1]
    targets, mask = targets.contiguous(), None if mask is None else mask.contiguous()
    if temperature.ndim and temperature.is_cpu:
        check_temperature(op, temperature, targets, mask, ignore_index)
    _C.check_targets(op, targets, mask, None, None, vocab, ignore_index)
    _C.token_logprobs(
        *(last_contiguous(logits), targets, mask, temperature, logprobs),
        *(spread if entropy else None, lse, top1, stats),
        *(ignore_index, torch.get_num_threads()),
    )
    return outputs


_token_logprobs = register(
    "token_logprobs",
    "(Tensor logits, Tensor targets, Tensor temperature, Tensor? mask, bool entropy, "
    "int ignore_index) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _allocate,
    _run,
    devices=("cpu", "cuda"),
)


def _allocate_backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    entropy: Tensor,
    stats: Tensor,
    ignore_index: int,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _run_backward(
    grad_logprobs,
    grad_entropy,
    logits,
    targets,
    temperature,
    mask,
    entropy,
    stats,
    ignore_index,
):
    grad = reused_pages(logits.new_empty(logits.shape))
    _C.token_logprobs_backward(
        *(None if g is None else plain_float(g) for g in (grad_logprobs, grad_entropy)),
        *(last_contiguous(logits), targets.contiguous()),
        *(None if mask is None else mask.contiguous(), temperature),
        *(entropy if entropy.numel() else None, stats, grad),
        *(ignore_index, torch.get_num_threads()),
    )
    return grad


_token_logprobs_backward = register(
    "token_logprobs_backward",
    "(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, Tensor targets, "
    "Tensor temperature, Tensor? mask, Tensor entropy, Tensor stats, int ignore_index) -> Tensor",
    _allocate_backward,
    _run_backward,
    devices=("cpu", "cuda"),
)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, mask, entropy, ignore_index):
        outputs = _token_logprobs(logits, targets, temperature, mask, entropy, ignore_index)
        _, spread, lse, top1, stats = outputs
        ctx.set_materialize_grads(False)
        ctx.ignore_index = ignore_index
        ctx.save_for_backward(logits, targets, temperature, mask, spread, stats)
        ctx.mark_non_differentiable(lse, top1)
        return outputs

    @staticmethod
    @differentiable_once("token_logprobs")
    def backward(ctx, grad_logprobs, grad_entropy, *_):
        logits, targets, temperature, mask, entropy, stats = ctx.saved_tensors
        if not entropy.numel():
            grad_entropy = None
        grad = _token_logprobs_backward(
            *(grad_logprobs, grad_entropy, logits, targets, temperature, mask, entropy, stats),
            ctx.ignore_index,
        )
        return grad, None, None, None, None, None


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    entropy: bool = True,
    ignore_index: int = -100,
) -> TokenLogprobs:
    """Log-probability of each row's target token, the row's entropy, its lse and top-1.

    With y = logits / temperature and lse = log sum_j exp y[j]::

        logprobs[n] = y[n, t] - lse[n]
        entropy[n]  = -sum_j p[n, j] log p[n, j],  p = exp(y - lse)
        top1[n]     = t is the lowest argmax of the row

    Args:
        logits: (N, V) float32, bfloat16 or float16; any row stride, never changed.
        targets: int64 (N,), each in [0, V) or ignore_index.
        temperature: a float, or a tensor, 0-d or (N,); above 0. No gradient.
        mask: bool (N,): False rows are not looked at.
        entropy: False: `entropy` is None, and its sums are not formed.
        ignore_index: rows with this target are not looked at.

    Returns:
        TokenLogprobs(logprobs, entropy, lse, top1), float32 and bool, (N,). logprobs <= 0 always.
        Masked and ignored rows hold 0 and False. Gradients, once, through logprobs and entropy.

    Raises:
        IndexError: a target is neither in [0, V) nor ignore_index.
        TypeError, ValueError: an element type, shape, device or temperature is not as documented.
        On CUDA the host does not wait to look at values: a target out of range or a temperature of
        0 or below makes its row NaN.

    Numerics: float32 arithmetic, one read of the logits. -inf logits weigh 0; a row with NaN or
    +inf, or of -inf alone, gives NaN and top1 False. A row's bits depend on that row alone.

    Source: log-probabilities and entropy as PPO uses them, Ouyang et al. 2022, arXiv:2203.02155.
    """
    scale = temperature_tensor("token_logprobs", temperature, logits.shape[0], logits.device)
    arguments = (logits, targets, scale, mask, bool(entropy), int(ignore_index))
    if torch.is_grad_enabled() and logits.requires_grad:
        logprobs, spread, lse, top1, _ = _TokenLogprobs.apply(*arguments)
    else:
        logprobs, spread, lse, top1, _ = _token_logprobs(*arguments)
    return TokenLogprobs(logprobs, spread if entropy else None, lse, top1)
