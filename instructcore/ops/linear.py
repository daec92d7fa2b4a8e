"""linear: x W^T + bias on the CPU, each row with the same bits in any batch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import (
    _C,
    autocast_dtype,
    check_device,
    check_dtype,
    check_float,
    check_shape,
    differentiable_once,
    fresh_pages,
    last_contiguous,
    register,
)


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The specification, in out_dtype if that is given, else in x's dtype."""
    dtype = out_dtype or x.dtype
    y = x.to(dtype) @ weight.to(dtype).T
    return y if bias is None else y + bias.to(dtype)


def _allocate(x: Tensor, weight: Tensor, bias: Tensor | None, wide: bool) -> Tensor:
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: x must be (..., K) and weight (N, K), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    check_float("linear", x=x)
    check_dtype("linear", x.dtype, weight=weight)
    check_device("linear", x, weight=weight)
    if bias is not None:
        check_dtype("linear", x.dtype, bias=bias)
        check_shape("linear", (weight.shape[0],), bias=bias)
        check_device("linear", x, bias=bias)
    dtype = torch.float32 if wide else x.dtype
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _matrix(tensor: Tensor) -> Tensor:
    """(..., K) as (N, K), its last stride 1."""
    return last_contiguous(tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1]))


def _run(x, weight, bias, wide):
    y = fresh_pages(_allocate(x, weight, bias, wide))
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        out = y if y.ndim == 2 else y.view(-1, y.shape[-1])
        multiply(_matrix(x), last_contiguous(weight), bias, out)
    return y


# The products themselves, for matrices of any of the three types with a last stride of 1; `to`
# receives the result, rounded to its type.


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, to: Tensor) -> None:
    """to = x W^T + bias"""
    _C.linear_forward(x, weight, bias, to, torch.get_num_threads())


def _packed_shape(weight: Tensor) -> tuple[int, int, int]:
    width = _C.linear_panel()
    return -(-weight.shape[0] // width), -(-weight.shape[1] // 2), width


def packed_size(weight: Tensor) -> int:
    """Elements of a `pack`ed weight."""
    return math.prod(_packed_shape(weight))


def pack(weight: Tensor, to: Tensor) -> Tensor:
    """A bfloat16 weight on the CPU in the order in which products read it, for `multiply` alone:
    where many of few rows read the same one. The results have the same bits.

    Returns:
        (panels, words, width) in the memory of `to`, float32 (packed_size(weight),); a word is two
        neighbours of a row.
    """
    to = to.view(_packed_shape(weight))
    _C.linear_pack(last_contiguous(weight), to, torch.get_num_threads())
    return to


def multiply_input(grad: Tensor, weight: Tensor, to: Tensor) -> None:
    """The gradient of x: to = grad W"""
    _C.linear_input(grad, weight, to, torch.get_num_threads())


def multiply_weight(grad: Tensor, x: Tensor, to: Tensor, accumulate: bool = False) -> None:
    """The gradient of W: to = grad^T x, added to a float32 `to` if told so."""
    _C.linear_weight(grad, x, to, accumulate, torch.get_num_threads())


def sum_rows(grad: Tensor, to: Tensor, accumulate: bool = False) -> None:
    """The gradient of the bias, added to a float32 `to` if told so."""
    _C.linear_bias(grad, to, accumulate, torch.get_num_threads())


_linear = register(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, bool wide) -> Tensor",
    _allocate,
    _run,
)


def _allocate_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        weight.new_empty((weight.shape[0] if needs[2] else 0,)),
    )


def _run_backward(grad, x, weight, needs):
    grads = _allocate_backward(grad, x, weight, needs)
    grad_x, grad_weight, grad_bias = (fresh_pages(g) for g in grads)
    grad = _matrix(grad)
    if grad_x.numel():
        multiply_input(grad, last_contiguous(weight), grad_x.view(-1, weight.shape[1]))
    if grad_weight.numel():
        multiply_weight(grad, _matrix(x), grad_weight)
    if grad_bias.numel():
        sum_rows(grad, grad_bias)
    return grads


_linear_backward = register(
    "linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _allocate_backward,
    _run_backward,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, wide):
        y = _linear(x, weight, bias, wide)
        mark = y.new_empty(0)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mark)
        return y, mark

    @staticmethod
    @differentiable_once("linear")
    def backward(ctx, grad, _):
        x, weight, _ = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        grads = _linear_backward(grad, x, weight, needs)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The linear map of `torch.nn.functional.linear`, each row with bits of its own.

    ::

        y[..., n] = sum_k x[..., k] weight[n, k] + bias[n]

    Args:
        x: (..., K) float32, bfloat16 or float16. Differentiable.
        weight: (N, K) of x's type. Differentiable.
        bias: (N,) of x's type. Differentiable.
        out_dtype: torch.float32 for a result that is not rounded to x's type; None: x's type.

    Returns:
        (..., N) of x's type or float32.

    Raises:
        TypeError, ValueError: an element type, shape or device is not the documented one.

    Numerics: sums are float32, rounded once. k is summed in blocks of 64 (bfloat16: 64 pairs), each
    one chain in its order, whose sums are added in theirs: a row's bits depend on that row, weight
    and bias alone, not on the other rows, their number, threads or strides, and gradients are the
    same bits for any number of threads. bfloat16 is multiplied in pairs, as the instruction of
    AVX-512 BF16 does, with the same bits where the machine lacks it, denormals aside; but where it
    has a matrix unit (Intel AMX), in one chain of groups of 32 terms. float16 costs what float32
    does. On CUDA all this is torch's own `linear`, in float32 for out_dtype=torch.float32. Under
    autocast all arguments are cast to its dtype.

    Source: the order of sums that no batch changes: He 2025, "Defeating nondeterminism in LLM
    inference", Thinking Machines Lab.
    """
    if dtype := autocast_dtype(x):
        x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    if out_dtype not in (None, torch.float32, x.dtype):
        raise TypeError(f"linear: out_dtype must be torch.float32 or x's type, got {out_dtype}")
    wide = out_dtype is not None
    if x.is_cuda:
        if not wide:
            return F.linear(x, weight, bias)
        inputs = (None if t is None else t.to(out_dtype) for t in (x, weight, bias))
        with torch.autocast("cuda", enabled=False):  # which would round the result
            return F.linear(*inputs)
    wide = wide and out_dtype != x.dtype
    trained = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if trained and torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias, wide)[0]
    return _linear(x, weight, bias, wide)
