"""rotary: rotary position embedding of the queries and keys of packed tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import (
    _C,
    check_device,
    check_dtype,
    check_float,
    differentiable_once,
    last_contiguous,
    register,
)


def rotary_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification, in float32 (float64 for a float64 qkv), differentiable by autograd."""
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    c, s = (x[positions.long(), None].to(wide) for x in (cos, sin))
    a, b = qkv[:, : heads + kv_heads].to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2).to(qkv.dtype)
    return turned[:, :heads], turned[:, heads:], qkv[:, heads + kv_heads :]


def _allocate(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, heads: int) -> Tensor:
    op = "rotary"
    check_float(op, qkv=qkv)
    check_dtype(op, torch.float32, cos=cos, sin=sin)
    check_dtype(op, torch.int32, positions=positions)
    if qkv.ndim != 3 or qkv.shape[2] % 2 or not 0 <= heads <= qkv.shape[1]:
        shape = "(N, heads + 2 kv_heads, D), D even"
        raise ValueError(f"{op}: qkv must be {shape}, got {tuple(qkv.shape)}")
    if cos.ndim != 2 or cos.shape[1] * 2 != qkv.shape[2] or sin.shape != cos.shape:
        shapes = f"{tuple(cos.shape)}, {tuple(sin.shape)}"
        raise ValueError(f"{op}: cos and sin must be (P, {qkv.shape[2] // 2}), got {shapes}")
    if positions.shape != qkv.shape[:1]:
        shape = tuple(positions.shape)
        raise ValueError(f"{op}: positions must be ({qkv.shape[0]},), got {shape}")
    check_device(op, qkv, cos=cos, sin=sin, positions=positions)
    return qkv.new_empty(qkv.shape[0], heads, qkv.shape[2])


def _by_torch(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, out: Tensor) -> None:
    """out = x turned, where there is no kernel."""
    turn = torch.complex(cos[positions], sin[positions]).unsqueeze(1)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    out.copy_(torch.view_as_real(pairs * turn).flatten(-2))


def _run(qkv, cos, sin, positions, heads):
    out = _allocate(qkv, cos, sin, positions, heads)
    if qkv.is_cuda:
        _by_torch(qkv[:, :heads], cos, sin, positions, out)
    else:
        _C.rotary(
            *(last_contiguous(qkv)[:, :heads], None, None, out, cos.contiguous(), sin.contiguous()),
            *(positions.contiguous(), False, torch.get_num_threads()),
        )
    return out


_rotary = register(
    "rotary",
    "(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, int heads) -> Tensor",
    _allocate,
    _run,
    devices=("cpu", "cuda"),
)


def _allocate_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> Tensor:
    heads = grad_q.shape[1] + grad_k.shape[1] + grad_v.shape[1]
    return grad_q.new_empty(grad_q.shape[0], heads, grad_q.shape[2])


def _run_backward(grad_q, grad_k, grad_v, cos, sin, positions):
    out = _allocate_backward(grad_q, grad_k, grad_v, cos, sin, positions)
    if grad_q.is_cuda:
        q, k, v = out.split([g.shape[1] for g in (grad_q, grad_k, grad_v)], 1)
        _by_torch(grad_q, cos, -sin, positions, q)
        _by_torch(grad_k, cos, -sin, positions, k)
        v.copy_(grad_v)
    else:
        _C.rotary(
            *(last_contiguous(g) for g in (grad_q, grad_k, grad_v)),
            *(out, cos.contiguous(), sin.contiguous(), positions.contiguous()),
            *(True, torch.get_num_threads()),
        )
    return out


_rotary_backward = register(
    "rotary_backward",
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor cos, Tensor sin, Tensor positions) "
    "-> Tensor",
    _allocate_backward,
    _run_backward,
    devices=("cpu", "cuda"),
)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, positions, heads, kv_heads):
        turned = _rotary(qkv, cos, sin, positions, heads + kv_heads)
        q, k = turned[:, :heads], turned[:, heads:]
        ctx.save_for_backward(cos, sin, positions, q)
        return q, k, qkv[:, heads + kv_heads :]

    @staticmethod
    @differentiable_once("rotary")
    def backward(ctx, grad_q, grad_k, grad_v):
        cos, sin, positions, _ = ctx.saved_tensors
        grad = _rotary_backward(grad_q, grad_k, grad_v, cos, sin, positions)
        return grad, None, None, None, None, None


def rotary(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Turns the queries and keys of packed tokens by their positions, and splits off the values.

    Pairs are neighbours, (x[2i], x[2i + 1]); with c = cos[positions[n], i] and s likewise::

        y[n, h, 2i]     = x[n, h, 2i] c - x[n, h, 2i + 1] s
        y[n, h, 2i + 1] = x[n, h, 2i + 1] c + x[n, h, 2i] s

    Args:
        qkv: (N, heads + 2 kv_heads, D) float32, bfloat16 or float16: queries, keys, values.
        cos, sin: (P, D / 2) float32, of the angle of each position and pair. No gradient.
        positions: (N,) int32, each in [0, P).
        heads, kv_heads: how many heads of qkv are queries, and how many are keys.

    Returns:
        q (N, heads, D), k (N, kv_heads, D), v (N, kv_heads, D), of qkv's dtype; v is a view of qkv.
        Gradients, once, of qkv.

    Raises:
        TypeError, ValueError: an element type, shape or device is not the documented one.
        RuntimeError: a position is outside [0, P) (on the CPU).

    Numerics: float32 arithmetic. On the CPU each product is rounded by itself, so a token has the
    same bits wherever it lies, and those of `attention_paged_`; on CUDA this is torch's product of
    complex numbers.

    Source: Su et al. 2021, arXiv:2104.09864.
    """
    if qkv.ndim == 3 and qkv.shape[1] != heads + 2 * kv_heads:
        shape = tuple(qkv.shape)
        raise ValueError(f"rotary: qkv must have {heads + 2 * kv_heads} heads, got {shape}")
    return _Rotary.apply(qkv, cos, sin, positions, heads, kv_heads)
