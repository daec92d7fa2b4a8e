"""What every op shares: the extension module, its registration with torch, and argument checks."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path

import torch
from torch import Tensor

try:
    from instructcore import _C
except ImportError as error:
    if (Path(__file__).parents[2] / "CMakeLists.txt").exists():
        raise ImportError(
            "instructcore: this is the source tree, without its compiled kernels: "
            "run `pip install -e .` here, or leave this folder to use the installed package"
        ) from error
    raise

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What an op that takes part in autocast casts its arguments to; None: nothing."""
    kind = x.device.type
    if kind in ("cpu", "cuda") and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def register(
    name: str, schema: str, allocate: Callable, run: Callable, devices: tuple[str, ...] = ("cpu",)
) -> Callable:
    """Define `instructcore::name`; `allocate` is its fake, `run` its body. Returns the op."""
    qualified = f"instructcore::{name}"
    torch.library.define(qualified, schema)
    torch.library.register_fake(qualified, allocate)
    torch.library.impl(qualified, devices, run)
    return getattr(torch.ops.instructcore, name).default


class _Refuse(torch.autograd.Function):
    """The first `count` tensors, whose gradients cannot be formed."""

    @staticmethod
    def forward(ctx, op, count, *tensors):
        ctx.op = op
        return tensors[:count]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.op}: double backward is not supported")


def differentiable_once(op: str) -> Callable:
    """Decorates the backward of a Function: under create_graph=True its gradients raise when they
    are differentiated, with respect to anything. The forward must save one of its outputs, for a
    way to its inputs; one that callers may change in place will not do.

    `once_differentiable` raises only where the incoming gradient requires one.
    """

    def decorate(backward: Callable) -> Callable:
        @wraps(backward)
        def once(ctx, *incoming):
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, *incoming)
            with torch.no_grad():
                results = backward(ctx, *incoming)
            outputs = [x for x in ctx.saved_tensors if x is not None and x.grad_fn is ctx]
            return _Refuse.apply(op, len(results), *results, outputs[0], *incoming)

        return once

    return decorate


def check_float(op: str, **tensors: Tensor | None) -> None:
    """float32, bfloat16 or float16, or a TypeError that names the argument."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}"
            )


def check_dtype(op: str, dtype: torch.dtype, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")


def check_shape(op: str, shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{op}: {name} must be {tuple(shape)}, got {tuple(tensor.shape)}")


def check_device(op: str, first: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device}, got {tensor.device}")


def last_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself if its last stride is 1 and no stride is 0 (expanded), else a copy."""
    strides = tensor.stride()
    if strides and (strides[-1] != 1 or 0 in strides):
        return tensor.contiguous()
    return tensor


def plain_float(tensor: Tensor) -> Tensor:
    """The tensor itself if it is contiguous float32, else a copy that is."""
    return tensor.to(torch.float32).contiguous()


def reused_pages(tensor: Tensor) -> Tensor:
    """The tensor itself, not yet touched, or if it is a large one on the CPU another like it, whose
    memory stays mapped when it is freed: the next one has no page faults (csrc/pages.h)."""
    size = tensor.numel() * tensor.element_size()
    if not tensor.is_cpu or size < 4 << 20:
        return tensor
    return torch.from_dlpack(_C.take_pages(size)).view(tensor.dtype).view(tensor.shape)


def fresh_pages(tensor: Tensor) -> Tensor:
    """The tensor itself, not yet touched: a large one on the CPU will lie in huge pages."""
    size = tensor.numel() * tensor.element_size()
    if size >= 4 << 20:
        _C.advise_huge_pages(tensor, size)
    return tensor


__all__ = [
    "FLOAT_DTYPES",
    "_C",
    "check_device",
    "check_dtype",
    "check_float",
    "check_shape",
    "differentiable_once",
    "fresh_pages",
    "last_contiguous",
    "plain_float",
    "register",
    "reused_pages",
]
