"""add_norm: a residual addition and the RMSNorm or LayerNorm of its result, in one pass."""

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
    register,
)


def add_norm_reference(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification, in float32 (float64 for a float64 x), differentiable by autograd."""
    total = x if branch is None else x + branch
    t = total if total.dtype == torch.float64 else total.float()
    mean = 0.0 if bias is None else t.mean(-1, keepdim=True)
    normed = (t - mean) * ((t - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    y = normed * weight.to(t.dtype)
    return total, (y if bias is None else y + bias.to(t.dtype)).to(dtype or x.dtype)


def _check(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> None:
    op = "add_norm"
    check_float(op, x=x, branch=branch)
    check_dtype(op, torch.float32, weight=weight, bias=bias)
    if x.ndim != 2:
        raise ValueError(f"{op}: x must be (N, C), got {tuple(x.shape)}")
    if branch is not None and x.dtype != torch.float32:
        raise TypeError(f"{op}: x must be float32 where there is a branch, got {x.dtype}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: dtype must be float32, bfloat16 or float16, got {dtype}")
    check_shape(op, x.shape, branch=branch)
    check_shape(op, (x.shape[1],), weight=weight, bias=bias)
    check_device(op, x, branch=branch, weight=weight, bias=bias)


def _allocate(x, branch, weight, bias, eps, dtype):
    _check(x, branch, weight, bias, eps, dtype)
    return (
        x.new_empty(x.shape if branch is not None else (0,), dtype=torch.float32),
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty((x.shape[0], 2), dtype=torch.float32),
    )


def _by_torch(x, branch, weight, bias, eps, dtype):
    """(total, y, stats), where there is no kernel."""
    total = x.float() if branch is None else x + branch
    if bias is None:
        mean, rstd = torch.zeros_like(total[:, :1]), torch.linalg.vector_norm(total, dim=-1)
        rstd = rstd.square_().mul_(1 / total.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        y = (total * rstd).mul_(weight)
    else:
        y, mean, rstd = torch.native_layer_norm(total, weight.shape, weight, bias, eps)
    return total if branch is not None else x.new_empty(0), y.to(dtype), torch.cat((mean, rstd), 1)


def _run(x, branch, weight, bias, eps, dtype):
    if x.is_cuda:
        _check(x, branch, weight, bias, eps, dtype)
        return _by_torch(x, branch, weight, bias, eps, dtype)
    total, y, stats = _allocate(x, branch, weight, bias, eps, dtype)
    _C.add_norm(
        *(last_contiguous(x), None if branch is None else last_contiguous(branch)),
        *(weight.contiguous(), None if bias is None else bias.contiguous()),
        *(total, y, stats, eps, torch.get_num_threads()),
    )
    return total, y, stats


_add_norm = register(
    "add_norm",
    "(Tensor x, Tensor? branch, Tensor weight, Tensor? bias, float eps, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor)",
    _allocate,
    _run,
    devices=("cpu", "cuda"),
)


def _allocate_backward(
    grad_total: Tensor | None,
    grad_y: Tensor,
    total: Tensor,
    weight: Tensor,
    stats: Tensor,
    centred: bool,
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(total, memory_format=torch.contiguous_format),
        grad_y.new_empty(total.shape if narrow else (0,)),
        torch.empty_like(weight),
        weight.new_empty(weight.shape if centred else (0,)),
    )


def _by_torch_backward(grad_total, grad_y, total, weight, stats, centred, narrow):
    t, grad = total.float(), grad_y.float()
    mean, rstd = (s.contiguous() for s in stats.split(1, 1))  # torch's backward assumes it
    if centred:
        grad_t, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad, t, list(weight.shape), mean, rstd, weight, weight, [True, True, True]
        )
    else:
        product = grad * t
        grad_weight, grad_bias = (rstd.t() @ product).view_as(weight), weight.new_empty(0)
        pull = (product @ weight).unsqueeze(-1).mul_(rstd.pow(3)).mul_(-1 / t.shape[-1])
        grad_t = (grad * weight).mul_(rstd).addcmul_(t, pull)
    if grad_total is not None:
        grad_t = grad_t.add_(grad_total)
    branch = grad_t.to(grad_y.dtype) if narrow else grad_y.new_empty(0)
    return grad_t.to(total.dtype), branch, grad_weight, grad_bias


def _run_backward(grad_total, grad_y, total, weight, stats, centred, narrow):
    arguments = (grad_total, grad_y, total, weight, stats, centred, narrow)
    if total.is_cuda:
        return _by_torch_backward(*arguments)
    grad_x, grad_branch, grad_weight, grad_bias = outputs = _allocate_backward(*arguments)
    blocks = _C.add_norm_sums(total.shape[0])
    _C.add_norm_backward(
        *(last_contiguous(grad_y), None if grad_total is None else last_contiguous(grad_total)),
        *(last_contiguous(total), weight.contiguous(), stats),
        *(grad_x, grad_branch if narrow else None, weight.new_empty(blocks, 2, total.shape[1])),
        *(grad_weight, grad_bias if centred else None, torch.get_num_threads()),
    )
    return outputs


_add_norm_backward = register(
    "add_norm_backward",
    "(Tensor? grad_total, Tensor grad_y, Tensor total, Tensor weight, Tensor stats, bool centred, "
    "bool narrow) -> (Tensor, Tensor, Tensor, Tensor)",
    _allocate_backward,
    _run_backward,
    devices=("cpu", "cuda"),
)


class _AddNorm(torch.autograd.Function):
    """`narrow`: the branch has y's type, not float32, and its gradient is written in it."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, dtype):
        total, y, stats = _add_norm(x, branch, weight, bias, eps, dtype)
        ctx.centred, ctx.branch_dtype = bias is not None, None if branch is None else branch.dtype
        ctx.narrow = branch is not None and branch.dtype == dtype != torch.float32
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if branch is None else total, weight, stats, y)
        return (y, None) if branch is None else (y, total)

    @staticmethod
    @differentiable_once("add_norm")
    def backward(ctx, grad_y, grad_total):
        total, weight, stats, y = ctx.saved_tensors
        grad_y = torch.zeros_like(y) if grad_y is None else grad_y
        grad_x, grad_branch, grad_weight, grad_bias = _add_norm_backward(
            grad_total, grad_y, total, weight, stats, ctx.centred, ctx.narrow
        )
        if ctx.branch_dtype is None:
            grad_branch = None
        elif not ctx.narrow:
            grad_branch = grad_x.to(ctx.branch_dtype)
        return grad_x, grad_branch, grad_weight, grad_bias if ctx.centred else None, None, None


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """A residual addition and the norm of its result.

    With mean(.) over the C channels of a row::

        total = x + branch                                          or x
        y = total / sqrt(mean(total^2) + eps) weight                RMSNorm, without a bias
        y = (total - mean(total)) / sqrt(var(total) + eps) weight + bias    LayerNorm

    Args:
        x: (N, C), float32 where there is a branch, else float32, bfloat16 or float16.
        branch: (N, C) float32, bfloat16 or float16, what a layer adds; None for the norm alone.
        weight: (C,) float32.
        bias: (C,) float32; None is RMSNorm.
        eps: added to the mean square (1e-5).
        dtype: of y; None is x's.

    Returns:
        (total, y): (N, C) float32, or x itself without a branch, and (N, C). Gradients, once, of
        all four tensors.

    Raises:
        TypeError, ValueError: an element type, shape or device is not the documented one.

    Numerics: float32 arithmetic. On the CPU a row's bits depend on that row alone, and those of the
    gradients of weight and bias do not depend on the number of threads; on CUDA these are torch's
    own functions.

    Source: Ba et al. 2016, arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    y, total = _AddNorm.apply(x, branch, weight, bias, float(eps), dtype or x.dtype)
    return (x if branch is None else total), y
