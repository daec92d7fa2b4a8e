"""The one tolerance rule: as exact as torch in the same dtype, give or take a factor of two."""

from __future__ import annotations

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
    assert torch.equal(ours[~finite].nan_to_num(), truth[~finite].nan_to_num()), (
        f"{name}: infinite or NaN where the reference differs"
    )
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
