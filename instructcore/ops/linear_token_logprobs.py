"""linear_token_logprobs: the language-model head fused with token_logprobs."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import (
    _C,
    check_device,
    check_dtype,
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
from .token_logprobs import (
    TokenLogprobs,
    check_temperature,
    temperature_tensor,
    token_logprobs_reference,
)


def linear_token_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    max_workspace_bytes: int | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    entropy: bool = True,
    ignore_index: int = -100,
) -> TokenLogprobs:
    """The specification, in float32 (float64 for float64 hidden), differentiable by autograd."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    return token_logprobs_reference(
        logits,
        targets,
        temperature=temperature,
        mask=mask,
        entropy=entropy,
        ignore_index=ignore_index,
    )


class _Rows:
    """The per-row arguments, of the rows that count."""

    def __init__(self, targets, temperature, mask, vocab, ignore_index):
        op = "linear_token_logprobs"
        targets, mask = targets.contiguous(), None if mask is None else mask.contiguous()
        if temperature.ndim and temperature.is_cpu:
            check_temperature(op, temperature, targets, mask, ignore_index)
        live = _C.check_targets(op, targets, mask, None, None, vocab, ignore_index)
        self.live = live_rows(live, targets, mask, ignore_index)
        self.index = self.live.index
        self.targets, self.mask = self.pick(targets), self.pick(mask)
        self.temperature = self.pick(temperature) if temperature.ndim else temperature

    def pick(self, x: Tensor | None) -> Tensor | None:
        return x if x is None or self.index is None else x[self.index]

    def at(self, rows: slice) -> tuple[Tensor, Tensor | None, Tensor]:
        mask = None if self.mask is None else cut(self.mask, rows)
        temperature = self.temperature
        if temperature.ndim:
            temperature = cut(temperature, rows)
        return cut(self.targets, rows), mask, temperature


def _allocate(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    mask: Tensor | None,
    entropy: bool,
    ignore_index: int,
    max_workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "linear_token_logprobs"
    check_dtype(op, torch.int64, targets=targets)
    check_head(op, hidden, weight, targets, bias, max_workspace_bytes)
    check_dtype(op, torch.float32, temperature=temperature)
    check_dtype(op, torch.bool, mask=mask)
    check_shape(op, tuple(targets.shape), mask=mask)
    check_device(op, hidden, temperature=temperature, mask=mask)
    n = targets.shape[0]  # len() would compile for this number alone
    return (
        hidden.new_empty((n,), dtype=torch.float32),
        hidden.new_empty((n if entropy else 0,), dtype=torch.float32),
        hidden.new_empty((n,), dtype=torch.float32),
        hidden.new_empty((n,), dtype=torch.bool),
        hidden.new_empty((n, 2), dtype=torch.float32),
    )


def _run(
    hidden,
    weight,
    targets,
    bias,
    temperature,
    mask,
    entropy,
    ignore_index,
    max_workspace_bytes,
):
    """(logprobs, entropy, lse, top1, stats)"""
    outputs = _allocate(
        *(hidden, weight, targets, bias, temperature, mask, entropy, ignore_index),
        max_workspace_bytes,
    )
    per_row = _Rows(targets, temperature, mask, weight.shape[0], ignore_index)
    head = Head(hidden, weight, bias, per_row.live, max_workspace_bytes)
    threads = torch.get_num_threads()
    found = outputs
    if per_row.index is not None:
        n = len(per_row.index)
        found = tuple(x.new_empty((n, *x.shape[1:])) for x in outputs)
    logprobs, spread, lse, top1, stats = found
    for rows, logits, _ in head.chunks():
        _C.token_logprobs(
            *(
                logits,
                *per_row.at(rows),
                cut(logprobs, rows),
                cut(spread, rows) if entropy else None,
            ),
            *(cut(lse, rows), cut(top1, rows), cut(stats, rows), ignore_index, threads),
        )
    if per_row.index is not None:
        for to, by in zip(outputs, found, strict=True):
            if len(to):
                to.zero_()[per_row.index] = by
    return outputs


_linear_token_logprobs = register(
    "linear_token_logprobs",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor temperature, "
    "Tensor? mask, bool entropy, int ignore_index, int max_workspace_bytes) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _allocate,
    _run,
    devices=("cpu", "cuda"),
)


def _allocate_backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    mask: Tensor | None,
    entropy: Tensor,
    stats: Tensor,
    ignore_index: int,
    max_workspace_bytes: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return allocate_gradients(hidden, weight, bias, tuple(needs))


def _run_backward(
    grad_logprobs,
    grad_entropy,
    hidden,
    weight,
    targets,
    bias,
    temperature,
    mask,
    entropy,
    stats,
    ignore_index,
    max_workspace_bytes,
    needs,
):
    per_row = _Rows(targets, temperature, mask, weight.shape[0], ignore_index)
    outputs = allocate_gradients(hidden, weight, bias, tuple(needs))
    head = Head(hidden, weight, bias, per_row.live, max_workspace_bytes, needed(outputs, needs))
    grads = [
        None if g is None else per_row.pick(plain_float(g)) for g in (grad_logprobs, grad_entropy)
    ]
    entropy = per_row.pick(entropy) if entropy.numel() else None
    stats, threads = per_row.pick(stats), torch.get_num_threads()
    for rows, logits, slopes in head.chunks():
        _C.token_logprobs_backward(
            *(None if g is None else cut(g, rows) for g in grads),
            *(
                logits,
                *per_row.at(rows),
                None if entropy is None else cut(entropy, rows),
                cut(stats, rows),
            ),
            *(slopes, ignore_index, threads),
        )
        head.back(rows, slopes)
    return outputs


_linear_token_logprobs_backward = register(
    "linear_token_logprobs_backward",
    "(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor targets, "
    "Tensor? bias, Tensor temperature, Tensor? mask, Tensor entropy, Tensor stats, "
    "int ignore_index, int max_workspace_bytes, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _allocate_backward,
    _run_backward,
    devices=("cpu", "cuda"),
)


class _LinearTokenLogprobs(torch.autograd.Function):
    """The backward forms the logits again: four GEMMs in all."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, mask, entropy, *settings):
        outputs = _linear_token_logprobs(
            hidden, weight, targets, bias, temperature, mask, entropy, *settings
        )
        _, spread, lse, top1, stats = outputs
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        ctx.save_for_backward(hidden, weight, targets, bias, temperature, mask, spread, stats)
        ctx.mark_non_differentiable(lse, top1)
        return outputs

    @staticmethod
    @differentiable_once("linear_token_logprobs")
    def backward(ctx, grad_logprobs, grad_entropy, *_):
        saved = ctx.saved_tensors  # once: checkpoint gives them out once
        hidden, weight, _, bias, *_, entropy, _ = saved
        needs = list(ctx.needs_input_grad[:3])
        grads = _linear_token_logprobs_backward(
            *(grad_logprobs, grad_entropy if entropy.numel() else None, *saved),
            *(*ctx.settings, needs),
        )
        inputs = (hidden, weight, bias)
        results = (
            g.to(x.dtype) if n else None for g, x, n in zip(grads, inputs, needs, strict=True)
        )
        return (*results, *[None] * 6)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    max_workspace_bytes: int | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    entropy: bool = True,
    ignore_index: int = -100,
) -> TokenLogprobs:
    """`token_logprobs` of the language-model head, whose logits never exist all at once.

    ::

        logits  = hidden @ weight.T + bias
        outputs = token_logprobs(logits, targets, ...)

    Args:
        hidden: (N, C) float32, bfloat16 or float16. Differentiable.
        weight: (V, C), of hidden's type or float32. Differentiable.
        targets: int64 (N,), each in [0, V) or ignore_index. On the CPU masked and ignored rows cost
            nothing, on CUDA their GEMMs.
        bias: (V,). Differentiable.
        max_workspace_bytes: bound of the memory beyond arguments, gradients, the float32 sum of
            weight's gradient and a few numbers per row, by chunks of rows (at least one row);
            if None 64 MiB, on CUDA 1 GiB.
        temperature, mask, entropy, ignore_index: as in `token_logprobs`.

    Returns:
        TokenLogprobs(logprobs, entropy, lse, top1), as `token_logprobs`.

    Raises:
        IndexError: a target is neither in [0, V) nor ignore_index (on the CPU; on CUDA its row is
            NaN).
        TypeError, ValueError: an element type, shape, device or setting is not the documented one.

    Numerics: as `linear_cross_entropy`; four GEMMs with the backward, which forms the logits again.
    Without a gradient to form only the logits' GEMM runs. On the CPU a row has the bits of
    `token_logprobs` of `linear`'s float32 logits.

    Source: as `linear_cross_entropy` and `token_logprobs`.
    """
    rows, device = targets.shape[0], hidden.device
    scale = temperature_tensor("linear_token_logprobs", temperature, rows, device)
    workspace = workspace_bytes(hidden, max_workspace_bytes)
    rest = (scale, mask, bool(entropy), int(ignore_index), workspace)
    trained = (
        hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if trained and torch.is_grad_enabled():
        outputs = _LinearTokenLogprobs.apply(hidden, weight, bias, targets, *rest)
    else:
        outputs = _linear_token_logprobs(hidden, weight, targets, bias, *rest)
    logprobs, spread, lse, top1, _ = outputs
    return TokenLogprobs(logprobs, spread if entropy else None, lse, top1)
