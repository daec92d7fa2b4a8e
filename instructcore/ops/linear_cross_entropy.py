"""linear_cross_entropy: the language-model head fused with its cross entropy."""

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
    plain_float,
    register,
)
from ._head import (
    Head,
    allocate_gradients,
    check_head,
    cut,
    live_rows,
    needed,
    workspace_bytes,
)
from .cross_entropy import check_settings, cross_entropy_reference, reduction_index, scaled


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    max_workspace_bytes: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The specification, in float32 (float64 for float64 hidden), differentiable by autograd."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    return cross_entropy_reference(
        logits,
        targets,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        weight=class_weight,
        reduction=reduction,
    )


def _allocate(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    grad_output: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: int,
    max_workspace_bytes: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "linear_cross_entropy"
    check_dtype(op, torch.int64, targets=targets)
    check_head(op, hidden, weight, targets, bias, max_workspace_bytes)
    check_dtype(op, torch.float32, class_weight=class_weight)
    check_shape(op, (weight.shape[0],), class_weight=class_weight)
    check_device(op, hidden, class_weight=class_weight)
    check_settings(op, label_smoothing, z_loss, softcap)
    loss = hidden.new_empty(targets.shape if reduction == 0 else (), dtype=torch.float32)
    return (loss, *allocate_gradients(hidden, weight, bias, tuple(needs)))


def _run(
    hidden,
    weight,
    targets,
    bias,
    class_weight,
    grad_output,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    reduction,
    max_workspace_bytes,
    needs,
):
    """(loss, grad_hidden, grad_weight, grad_bias), the gradients times grad_output, or 1."""
    loss, *grads = _allocate(
        *(hidden, weight, targets, bias, class_weight, grad_output, ignore_index),
        *(label_smoothing, z_loss, softcap, reduction, max_workspace_bytes, needs),
    )
    targets = targets.contiguous()
    total = hidden.new_empty((), dtype=torch.float32) if reduction == 2 else None
    class_weight = None if class_weight is None else class_weight.contiguous()
    live = _C.check_targets(
        *("linear_cross_entropy", targets, None, class_weight, total),
        *(weight.shape[0], ignore_index),
    )
    rows_that_count = live_rows(live, targets, None, ignore_index)
    index = rows_that_count.index
    if index is not None:
        targets = targets[index]
        if grad_output is not None and grad_output.ndim:
            grad_output = grad_output[index]
    head = Head(hidden, weight, bias, rows_that_count, max_workspace_bytes, needed(grads, needs))
    whole = reduction == 0 and index is None
    losses = loss if whole else torch.empty_like(targets, dtype=torch.float32)
    gradient, threads = any(needs), torch.get_num_threads()
    each = grad_output is not None and grad_output.ndim == 1
    for rows, logits, slopes in head.chunks():
        _C.cross_entropy(
            *(logits, cut(targets, rows), class_weight, total),
            *(cut(grad_output, rows) if each else grad_output, cut(losses, rows), None),
            *(slopes if gradient else None, ignore_index, label_smoothing, z_loss, softcap),
            threads,
        )
        if gradient:
            head.back(rows, slopes)
    if reduction != 0:
        _C.reduce_losses(losses, total, loss)
    elif index is not None:
        loss.zero_()[index] = losses
    return (loss, *grads)


_linear_cross_entropy = register(
    "linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? class_weight, "
    "Tensor? grad_output, int ignore_index, float label_smoothing, float z_loss, float softcap, "
    "int reduction, int max_workspace_bytes, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _allocate,
    _run,
    devices=("cpu", "cuda"),
)


class _LinearCrossEntropy(torch.autograd.Function):
    """For a scalar loss the forward forms the gradients, with three GEMMs, and the backward scales
    them; for the loss of each row the backward forms the logits again, and for float16, whose loss
    scale must come first.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, class_weight, settings):
        ctx.needs, ctx.settings = list(ctx.needs_input_grad[:3]), settings
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.formed = settings[4] != 0 and hidden.dtype != torch.float16
        loss, *grads = _linear_cross_entropy(
            *(hidden, weight, targets, bias, class_weight, None, *settings),
            ctx.needs if ctx.formed else [False] * 3,
        )
        ctx.set_materialize_grads(False)
        mark = loss.new_empty(0)
        if ctx.formed:
            ctx.save_for_backward(*grads, mark)
        else:
            ctx.save_for_backward(hidden, weight, targets, bias, class_weight, mark)
        return loss, mark

    @staticmethod
    @differentiable_once("linear_cross_entropy")
    def backward(ctx, grad_output, _):
        *saved, _ = ctx.saved_tensors
        if ctx.formed:
            grads = saved
        else:
            _, *grads = _linear_cross_entropy(
                *saved, plain_float(grad_output), *ctx.settings, ctx.needs
            )
        results = []
        for grad, need, dtype in zip(grads, ctx.needs, ctx.dtypes, strict=True):
            if need and ctx.formed:
                grad = scaled(grad, grad_output)
            results.append(grad.to(dtype) if need else None)
        return (*results, None, None, None)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    max_workspace_bytes: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of the language-model head, whose logits never exist all at once.

    ::

        logits = hidden @ weight.T + bias
        loss   = cross_entropy(logits, targets, ...)

    Args:
        hidden: (N, C) float32, bfloat16 or float16. Differentiable.
        weight: (V, C), of hidden's type or float32. Differentiable.
        targets: int64 (N,), each in [0, V) or ignore_index. Ignored rows cost nothing on the CPU
            and their GEMMs on CUDA.
        bias: (V,). Differentiable.
        class_weight: (V,), `weight` of `cross_entropy`.
        max_workspace_bytes: bound of the memory beyond arguments, gradients, the float32 sum of
            weight's gradient and a few numbers per row, by chunks of rows (at least one row);
            if None 64 MiB, on CUDA 1 GiB.
        ignore_index, label_smoothing, z_loss, softcap, reduction: as in `cross_entropy`.

    Returns:
        float32: 0-d, or (N,) for reduction="none".

    Raises:
        IndexError: a target is neither in [0, V) nor ignore_index (on the CPU; on CUDA its loss
            and gradient are NaN).
        TypeError, ValueError: an element type, shape, device or setting is not the documented one.

    Numerics: logits are float32, not rounded to hidden's type; weight's gradient is summed in
    float32. bfloat16: the GEMMs of the gradients take the logits' gradient as bfloat16. A scalar
    loss takes three GEMMs, its gradients are formed in the forward; reduction="none" and float16
    four. Without a gradient to form only the logits' GEMM runs. On the CPU the GEMMs are those of
    `linear`: the bits do not depend on the threads, and a row's loss not on the other rows. On CUDA
    they are torch's.

    Source: Wijmans et al. 2024, arXiv:2411.09009; gradients in the forward: Hsu et al. 2024,
    arXiv:2410.10989.
    """
    settings = (
        int(ignore_index),
        float(label_smoothing),
        float(z_loss),
        float(softcap),
        reduction_index("linear_cross_entropy", reduction),
        workspace_bytes(hidden, max_workspace_bytes),
    )
    check_float("linear_cross_entropy", class_weight=class_weight)
    class_weight = None if class_weight is None else class_weight.float()
    trained = (
        hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if trained and torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(hidden, weight, bias, targets, class_weight, settings)[0]
    arguments = (hidden, weight, targets, bias, class_weight, None, *settings)
    return _linear_cross_entropy(*arguments, [False] * 3)[0]
