"""cross_entropy: softmax cross entropy over a vocabulary, its gradient formed with the loss."""

from __future__ import annotations

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

REDUCTIONS = ("none", "sum", "mean")


def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The specification, in float32 (float64 for float64 logits), differentiable by autograd."""
    vocab = logits.shape[1]
    live = targets != ignore_index
    if ((targets < 0) | (targets >= vocab))[live].any():
        raise IndexError(f"cross_entropy: targets must be in [0, {vocab}) or {ignore_index}")
    target = torch.where(live, targets, 0)[:, None]
    x = logits if logits.dtype == torch.float64 else logits.float()
    x = torch.where(live[:, None], x, 0.0)
    if softcap > 0:
        x = softcap * torch.tanh(x / softcap)
    logprobs = x.log_softmax(-1)
    share = torch.ones(vocab).to(x) if weight is None else weight.to(x.dtype)
    loss = -(1 - label_smoothing) * share[target[:, 0]] * logprobs.gather(1, target)[:, 0]
    if label_smoothing > 0:
        smooth = torch.where(share == 0, 0.0, share * logprobs).sum(-1)
        loss = loss - label_smoothing / vocab * smooth
    if z_loss > 0:
        loss = loss + z_loss * x.logsumexp(-1) ** 2
    loss = torch.where(live, loss, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = torch.where(live, share[target[:, 0]], 0.0).sum()
    return torch.where(total == 0, 0.0, loss.sum() / torch.where(total == 0, 1.0, total))


def check_settings(op: str, label_smoothing: float, z_loss: float, softcap: float) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"{op}: z_loss must be 0 (off) or above, got {z_loss}")
    if not softcap >= 0:
        raise ValueError(f"{op}: softcap must be 0 (off) or above, got {softcap}")


def reduction_index(op: str, reduction: str) -> int:
    if reduction not in REDUCTIONS:
        raise ValueError(f'{op}: reduction must be "mean", "sum" or "none", got {reduction!r}')
    return REDUCTIONS.index(reduction)


def _allocate(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: int,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "cross_entropy"
    check_float(op, logits=logits)
    check_dtype(op, torch.int64, targets=targets)
    check_dtype(op, torch.float32, weight=weight)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"{op}: logits must be (N, V), V > 0, got {tuple(logits.shape)}")
    rows, vocab = logits.shape
    check_shape(op, (rows,), targets=targets)
    check_shape(op, (vocab,), weight=weight)
    check_device(op, logits, targets=targets, weight=weight)
    check_settings(op, label_smoothing, z_loss, softcap)
    return (
        logits.new_empty((rows,) if reduction == 0 else (), dtype=torch.float32),
        logits.new_empty((0,) if gradient else (rows, 2), dtype=torch.float32),
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty((rows, vocab) if gradient else (0,)),
    )


def _run(
    logits,
    targets,
    weight,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    reduction,
    gradient,
):
    """(loss, stats, total, grad): the gradient of the loss, or the stats to form it from."""
    loss, stats, total, grad = _allocate(
        *(logits, targets, weight, ignore_index, label_smoothing, z_loss, softcap),
        *(reduction, gradient),
    )
    grad, targets = reused_pages(grad), targets.contiguous()
    weight = None if weight is None else weight.contiguous()
    divisor = total if reduction == 2 else None
    _C.check_targets("cross_entropy", targets, None, weight, total, logits.shape[1], ignore_index)
    losses = loss if reduction == 0 else torch.empty_like(targets, dtype=torch.float32)
    _C.cross_entropy(
        *(last_contiguous(logits), targets, weight, divisor, None, losses),
        *((None, grad) if gradient else (stats, None)),
        *(ignore_index, label_smoothing, z_loss, softcap, torch.get_num_threads()),
    )
    if reduction != 0:
        _C.reduce_losses(losses, divisor, loss)
    return loss, stats, total, grad


_cross_entropy = register(
    "cross_entropy",
    "(Tensor logits, Tensor targets, Tensor? weight, int ignore_index, float label_smoothing, "
    "float z_loss, float softcap, int reduction, bool gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _allocate,
    _run,
    devices=("cpu", "cuda"),
)


def _allocate_backward(
    grad_output: Tensor,
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    total: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: int,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _run_backward(
    grad_output,
    logits,
    targets,
    weight,
    stats,
    total,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    reduction,
):
    grad = reused_pages(logits.new_empty(logits.shape))
    _C.cross_entropy(
        last_contiguous(logits),
        targets.contiguous(),
        None if weight is None else weight.contiguous(),
        total if reduction == 2 else None,
        plain_float(grad_output),
        None,
        stats,
        grad,
        *(ignore_index, label_smoothing, z_loss, softcap, torch.get_num_threads()),
    )
    return grad


_cross_entropy_backward = register(
    "cross_entropy_backward",
    "(Tensor grad_output, Tensor logits, Tensor targets, Tensor? weight, Tensor stats, "
    "Tensor total, int ignore_index, float label_smoothing, float z_loss, float softcap, "
    "int reduction) -> Tensor",
    _allocate_backward,
    _run_backward,
    devices=("cpu", "cuda"),
)


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor, without a pass where the factor is known to be 1."""
    if torch.compiler.is_compiling():
        return gradient * factor
    if gradient.is_cpu and factor.item() == 1.0:
        return gradient
    return torch.mul(gradient, factor, out=reused_pages(torch.empty_like(gradient)))


class _CrossEntropy(torch.autograd.Function):
    """For a scalar loss the forward forms the gradient, from one read of the logits, and the
    backward scales it. float16 waits for the incoming gradient: the loss scale must come first.
    """

    @staticmethod
    def forward(ctx, logits, targets, weight, settings):
        ctx.formed = settings[-1] != 0 and logits.dtype != torch.float16
        loss, stats, total, grad = _cross_entropy(logits, targets, weight, *settings, ctx.formed)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        if ctx.formed:
            ctx.save_for_backward(grad, total)
        else:
            ctx.save_for_backward(logits, targets, weight, stats, total)
        return loss, total

    @staticmethod
    @differentiable_once("cross_entropy")
    def backward(ctx, grad_output, _):
        if ctx.formed:
            return scaled(ctx.saved_tensors[0], grad_output), None, None, None
        grad = _cross_entropy_backward(grad_output, *ctx.saved_tensors, *ctx.settings)
        return grad, None, None, None


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Softmax cross entropy of each row with its target class, as `F.cross_entropy`.

    With y = softcap tanh(logits / softcap) or the logits, w the class weights or 1, s the label
    smoothing, lse = log sum_j exp y[j]::

        loss[n] = (1 - s) w[t] (lse - y[t]) + s / V sum_j w[j] (lse - y[j]) + z_loss lse^2
        mean    = sum loss[n] / sum w[t[n]], over the rows whose target is not ignore_index

    Args:
        logits: (N, V) float32, bfloat16 or float16; any row stride, never changed.
        targets: int64 (N,), each in [0, V) or ignore_index.
        ignore_index: rows with this target have loss 0 and gradient 0, whatever their logits.
        label_smoothing: share of the target spread over all classes, 0..1 (0.1).
        z_loss: weight of lse^2, against drift of the logits (1e-4); it has no class weight.
        softcap: bound of the logits, applied first (30); 0 is off.
        weight: (V,), class weights. No gradient.
        reduction: "mean", "sum", or "none" for the loss of each row, (N,).

    Returns:
        float32, whatever the input type. Every target ignored, or weighing 0, or no rows: the mean
        is 0 and its gradient 0.

    Raises:
        IndexError: a target is neither in [0, V) nor ignore_index (on the CPU; on CUDA its loss
            and gradient are NaN).
        TypeError, ValueError: an element type, shape, device or setting is not the documented one.

    Numerics: float32 arithmetic, one read of the logits; the gradient at the target goes through
    expm1, so that it keeps its digits near probability 1. -inf logits weigh 0; a row with NaN or
    +inf, or of -inf alone, gives NaN. The same bits for any number of threads.

    Source: z-loss: Chowdhery et al. 2022, arXiv:2204.02311, section 5; softcap: Gemma Team 2024,
    arXiv:2408.00118.
    """
    settings = (
        int(ignore_index),
        float(label_smoothing),
        float(z_loss),
        float(softcap),
        reduction_index("cross_entropy", reduction),
    )
    check_float("cross_entropy", weight=weight)
    weight = None if weight is None else weight.float()
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CrossEntropy.apply(logits, targets, weight, settings)[0]
    return _cross_entropy(logits, targets, weight, *settings, False)[0]
