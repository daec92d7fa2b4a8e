"""The one tolerance rule: as exact as torch in the same dtype, give or take a factor of two."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_close(
    ours: Tensor, native: Tensor, truth: Tensor, dtype: torch.dtype | None = None, name: str = ""
) -> None:
    """|ours - truth| <= 2 max|native - truth| + eps max|truth|, elementwise.

    `truth` is the float64 reference on the same (already rounded) inputs, `native` plain torch in
    the input's dtype. `dtype`, whose eps counts, is the output's unless given. Infinities and NaN
    must agree.
    """
    if not (ours.shape == native.shape == truth.shape):
        raise AssertionError(f"{name}: shapes {ours.shape}, {native.shape}, {truth.shape} differ")
    eps = EPS[dtype or ours.dtype]
    ours, native, truth = (x.detach().cpu().double() for x in (ours, native, truth))
    finite = truth.isfinite()
    assert torch.equal(ours.isnan(), truth.isnan()), f"{name}: NaN where the reference differs"
    ours_infinite, infinite = (torch.where(x.isinf(), x, 0.0) for x in (ours, truth))
    assert torch.equal(ours_infinite, infinite), f"{name}: infinite where the reference differs"
    if not finite.any():
        return
    error = (ours - truth)[finite].abs()
    theirs = (native - truth)[finite].abs()
    bound = 2 * _max(theirs) + eps * _max(truth[finite].abs())
    worst = float(error.max())
    assert worst <= bound, f"{name}: error {worst:.3e} above {bound:.3e}"


def _max(x: Tensor) -> float:
    x = x[x.isfinite()]
    return float(x.max()) if x.numel() else 0.0


def assert_same_bits(a: Tensor, b: Tensor, name: str = "") -> None:
    assert a.dtype == b.dtype and a.shape == b.shape, (
        f"{name}: {a.dtype}{a.shape}, {b.dtype}{b.shape}"
    )
    integer = {2: torch.int16, 4: torch.int32}.get(a.element_size())
    if integer is not None and a.is_floating_point():
        a, b = a.contiguous().view(integer), b.contiguous().view(integer)
    differ = int((a != b).sum())
    assert differ == 0, f"{name}: {differ} of {a.numel()} elements differ in their bits"


def assert_differentiable_once(op: str, f: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Who differentiates a gradient of f(*inputs), a 0-d tensor, is told that it cannot be done."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    factor = torch.ones((), device=leaves[0].device, requires_grad=True)
    for loss, more in ((f(*leaves), ()), (factor * f(*(2 * x for x in leaves)), (factor,))):
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        for gradient, leaf in zip(gradients, leaves, strict=True):
            # What depends on the leaf in another way, too, must not pass as the whole.
            total = gradient.square().sum() + leaf.sum() + factor
            for wanted in (None, leaf, *more):
                with pytest.raises(RuntimeError, match=f"^{op}: double backward is not supported"):
                    if wanted is None:
                        total.backward(retain_graph=True)
                    else:
                        torch.autograd.grad(total, wanted, retain_graph=True)
