"""activation: swiglu and gelu, each element's bits a function of its own inputs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import _C, check_float, differentiable_once, last_contiguous, register


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The specification, in the input's dtype."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def gelu_reference(x: Tensor) -> Tensor:
    """The specification, in the input's dtype."""
    return F.gelu(x, approximate="tanh")


def _allocate(x: Tensor, gated: bool) -> Tensor:
    op, name = ("swiglu", "gate_up") if gated else ("gelu", "x")
    check_float(op, **{name: x})
    if x.ndim < 1 or (gated and x.shape[-1] % 2):
        shape = "(..., 2F)" if gated else "(..., F)"
        raise ValueError(f"{op}: {name} must be {shape}, got {tuple(x.shape)}")
    return x.new_empty((*x.shape[:-1], x.shape[-1] // (2 if gated else 1)))


def _rows(x: Tensor) -> Tensor:
    return last_contiguous(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


def _run(x, gated):
    if x.is_cuda:
        return swiglu_reference(x) if gated else gelu_reference(x)
    out = _allocate(x, gated)
    _C.activation(_rows(x), None, _rows(out), gated, torch.get_num_threads())
    return out


_activation = register(
    "activation", "(Tensor x, bool gated) -> Tensor", _allocate, _run, devices=("cpu", "cuda")
)


def _allocate_backward(grad_output: Tensor, x: Tensor, gated: bool) -> Tensor:
    return x.new_empty(x.shape)


def _run_backward(grad_output, x, gated):
    out = _allocate_backward(grad_output, x, gated)
    if x.is_cuda and gated:
        (gate, up), (grad_gate, grad_up) = x.chunk(2, -1), out.chunk(2, -1)
        torch.mul(grad_output, F.silu(gate), out=grad_up)
        torch.mul(grad_output, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    elif x.is_cuda:
        torch.ops.aten.gelu_backward.grad_input(grad_output, x, approximate="tanh", grad_input=out)
    else:
        _C.activation(_rows(x), _rows(grad_output), _rows(out), gated, torch.get_num_threads())
    return out


_activation_backward = register(
    "activation_backward",
    "(Tensor grad_output, Tensor x, bool gated) -> Tensor",
    _allocate_backward,
    _run_backward,
    devices=("cpu", "cuda"),
)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gated):
        out = _activation(x, gated)
        ctx.gated = gated
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    @differentiable_once("activation")
    def backward(ctx, grad_output):
        x, _ = ctx.saved_tensors
        return _activation_backward(grad_output, x, ctx.gated), None


def swiglu(gate_up: Tensor) -> Tensor:
    """The gated activation of Llama's MLP::

        out[.., i] = silu(gate[.., i]) up[.., i],  silu(x) = x / (1 + exp(-x))

    Args:
        gate_up: (..., 2F) = [gate, up], float32, bfloat16 or float16; never changed.

    Returns:
        (..., F), of the input's dtype. One gradient, of the input; its two halves are written in
        place, without a copy.

    Raises:
        TypeError, ValueError: an element type or shape is not the documented one.

    Numerics: float32 arithmetic, rounded once. On the CPU an element's bits depend on its two
    inputs alone, not on where they lie; on CUDA these are torch's own functions.

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    return _Activation.apply(gate_up, True)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, GPT-2's "gelu_new"::

        out[i] = x[i] / 2 (1 + tanh(sqrt(2 / pi) (x[i] + 0.044715 x[i]^3)))

    Args:
        x: (..., F) float32, bfloat16 or float16; never changed.

    Returns:
        Of x's shape and dtype. One gradient.

    Raises:
        TypeError, ValueError: an element type or shape is not the documented one.

    Numerics: float32 arithmetic, rounded once. On the CPU an element's bits depend on its own input
    alone, not on where it lies; on CUDA this is torch's own function.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    return _Activation.apply(x, False)
