"""rotary: heads turned by the angles of their positions, with the bits of attention_paged_."""

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

MAX_DIM = 256


def rotary_reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    heads: int | None = None,
    interleaved: bool = True,
) -> Tensor:
    """The specification; products and sums in float32, or in cos' type if that is wider."""
    heads = x.shape[1] if heads is None else heads
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    turned = x[:, :heads].to(cos.dtype)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned.to(x.dtype), x[:, heads:]), 1)


def _allocate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    heads: int,
    interleaved: bool,
    back: bool,
) -> Tensor:
    check_float("rotary", x=x)
    if x.ndim != 3 or x.shape[2] % 2 or not 0 < x.shape[2] <= MAX_DIM:
        raise ValueError(
            f"rotary: x must be (N, H, D), D even and at most {MAX_DIM}, got {tuple(x.shape)}"
        )
    check_dtype("rotary", torch.float32, cos=cos, sin=sin)
    check_dtype("rotary", torch.int32, positions=positions)
    check_shape("rotary", (x.shape[0],), positions=positions)
    if cos.ndim != 2 or cos.shape[1] != x.shape[2] // 2:
        raise ValueError(f"rotary: cos must be (positions, D / 2), got {tuple(cos.shape)}")
    check_shape("rotary", tuple(cos.shape), sin=sin)
    check_device("rotary", x, cos=cos, sin=sin, positions=positions)
    if not 0 <= heads <= x.shape[1]:
        raise ValueError(f"rotary: heads must be in 0 .. {x.shape[1]}, got {heads}")
    return x.new_empty(x.shape)


def _run(x, cos, sin, positions, heads, interleaved, back):
    out = _allocate(x, cos, sin, positions, heads, interleaved, back)
    if x.is_cuda:
        sin = -sin if back else sin
        return rotary_reference(x, cos, sin, positions, heads=heads, interleaved=interleaved)
    if out.numel():
        _C.rotary(
            last_contiguous(x),
            cos.contiguous(),
            sin.contiguous(),
            positions.contiguous(),
            out,
            heads,
            interleaved,
            back,
            torch.get_num_threads(),
        )
    return out


_rotary = register(
    "rotary",
    "(Tensor x, Tensor cos, Tensor sin, Tensor positions, int heads, bool interleaved, bool back)"
    " -> Tensor",
    _allocate,
    _run,
    devices=("cpu", "cuda"),
)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *arguments):
        ctx.arguments = arguments[3:]
        out = _rotary(x, *arguments, False)
        ctx.save_for_backward(*arguments[:3], out)
        return out

    @staticmethod
    @differentiable_once("rotary")
    def backward(ctx, grad):
        *tables, _ = ctx.saved_tensors
        return (_rotary(grad, *tables, *ctx.arguments, True), *(None,) * 5)


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    heads: int | None = None,
    interleaved: bool = True,
) -> Tensor:
    """The rotary position embedding of a packed tensor's heads::

        a' = a cos[p, i] - b sin[p, i],   b' = b cos[p, i] + a sin[p, i],   p = positions[n]

    Args:
        x: (N, H, D) float32, bfloat16 or float16, D even, at most 256. Differentiable.
        cos, sin: (positions, D/2) float32.
        positions: (N,) int32, each in 0 .. positions - 1.
        heads: so many of the first heads turn, the others are copied; None: all turn. So queries,
            keys and values of one projection take one call.
        interleaved: pair i is (2i, 2i + 1); False: (i, i + D/2), as Hugging Face's Llama has it.

    Returns:
        (N, H, D) contiguous, of x's type.

    Raises:
        TypeError, ValueError: an element type, shape or device is not the documented one.
        IndexError: a position out of range, on the CPU.

    Numerics: each product and sum rounds to float32, then the result to x's type: the bits that
    `attention_paged_` gives the same pair, wherever it lies. On CUDA this is plain torch.

    Source: Su et al. 2021, arXiv:2104.09864.
    """
    heads = x.shape[1] if heads is None and x.ndim > 1 else heads or 0
    return _Rotary.apply(x, cos, sin, positions, heads, interleaved)
