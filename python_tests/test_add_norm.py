from __future__ import annotations

import math

import pytest
import torch
from tolerance import assert_close, assert_differentiable_once, assert_same_bits

from instructcore import _C
from instructcore.ops import add_norm, add_norm_reference
from instructcore.ops.add_norm import _by_torch, _by_torch_backward

EPS = 1e-5
# (N, C) and why
SHAPES = {
    (1, 1): "one channel: RMSNorm is a sign, LayerNorm the bias",
    (3, 7): "less than a vector",
    (5, 97): "whole vectors and a tail",
    (131, 64): "blocks of 64 rows, and a last one of 3",
    (2, 1025): "many vectors and a tail of one",
    (0, 8): "no rows",
}
NORMS = ("rms", "layer")


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    """On a GPU this op is torch's, which the emulator knows nothing of."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def inputs(shape, norm, dtype=torch.float32, device="cpu", branch=True):
    """x, branch, weight, bias: x is narrow only where it stands alone."""
    x, other = 2 * torch.randn(2, *shape, device=device) + 0.5
    weight, bias = torch.rand(2, shape[1], device=device) + 0.5
    x = x if branch else x.to(dtype)
    return x, other.to(dtype) if branch else None, weight, bias if norm == "layer" else None


def evaluate(f, tensors, upstream, wide=False, **options):
    """total, y and the gradients of all tensors that there are."""
    leaves = [None if t is None else t.double() if wide else t for t in tensors]
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    out = f(*leaves, eps=EPS, **options)
    wanted = [t for t in leaves if t is not None]
    upstream = [u.to(o.dtype) for u, o in zip(upstream, out, strict=True)]
    grads = torch.autograd.grad(out, wanted, upstream)
    return [*(o.detach() for o in out), *grads]


def test_known_values():
    x, branch = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]])
    weight = torch.tensor([2.0, 10.0])
    # total = 3, 4: mean square 12.5.
    total, y = add_norm(x, branch, weight, eps=0.0)
    assert total.tolist() == [[3.0, 4.0]]
    assert y.tolist()[0] == pytest.approx([6 / math.sqrt(12.5), 40 / math.sqrt(12.5)])
    # Mean 3.5, variance 1/4: -1 and 1.
    _, y = add_norm(x, branch, weight, torch.tensor([0.0, 1.0]), eps=0.0)
    assert y.tolist()[0] == pytest.approx([-2.0, 11.0])
    # Without a branch, x itself comes back.
    same, y = add_norm(total, None, weight, eps=0.0)
    assert same is total
    # dy = (1, 0), g = (2, 0), n = (3, 4) / rms: dt = (g - n (g n) / 2) / rms, g n = 6 / rms.
    total.requires_grad_()
    _, y = add_norm(total, None, weight, eps=0.0)
    (grad,) = torch.autograd.grad(y[0, 0], total)
    rms = math.sqrt(12.5)
    expected = [(2 - 3 * 6 / 2 / 12.5) / rms, -4 * 6 / 2 / 12.5 / rms]
    assert grad.tolist()[0] == pytest.approx(expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "alone"])
def test_matches_reference(device, dtype, shape, norm, branch, isa):
    tensors = inputs(shape, norm, dtype, device, branch)
    ours = add_norm(*tensors, eps=EPS, dtype=dtype)
    native = add_norm_reference(*tensors, eps=EPS, dtype=dtype)
    wide = [None if t is None else t.double() for t in tensors]
    truth = add_norm_reference(*wide, eps=EPS)
    assert ours[0].dtype == tensors[0].dtype and ours[1].dtype == dtype
    for a, b, c, name in zip(ours, native, truth, ("total", "y"), strict=True):
        assert_close(a, b, c, name=name)
    # Rows with a stride.
    apart = [None if t is None else torch.cat((t, t), 1)[:, : shape[1]] for t in tensors[:2]]
    for a, b in zip(add_norm(*apart, *tensors[2:], eps=EPS, dtype=dtype), ours, strict=True):
        assert_same_bits(a.contiguous(), b)


@pytest.mark.parametrize("shape", [(5, 97), (131, 64), (2, 1025)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "alone"])
def test_gradients(device, dtype, shape, norm, branch, isa):
    tensors = inputs(shape, norm, dtype, device, branch)
    upstream = torch.randn(2, *shape, device=device)
    upstream[1] = upstream[1].to(dtype)
    ours = evaluate(add_norm, tensors, upstream, dtype=dtype)
    native = evaluate(add_norm_reference, tensors, upstream, dtype=dtype)
    truth = evaluate(add_norm_reference, tensors, upstream, wide=True)
    for a, b, c in zip(ours, native, truth, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, c)
    # Through one of the two alone, and with a gradient that has no memory of its own.
    for i in (0, 1):
        results = []
        for f, wide in ((add_norm, False), (add_norm_reference, False), (add_norm_reference, True)):
            given = [t if t is None or not wide else t.double() for t in tensors]
            leaf = given[0].detach().requires_grad_()
            options = {} if wide else {"dtype": dtype}
            out = f(leaf, *given[1:], eps=EPS, **options)[i]
            results += torch.autograd.grad(out.sum(), leaf)
        assert_close(*results, dtype=dtype)


@pytest.mark.parametrize("norm", NORMS)
def test_by_torch(norm):
    """What runs on CUDA, here on the CPU."""
    x, branch, weight, bias = inputs((5, 97), norm)
    upstream = torch.randn(2, 5, 97)
    total, y, stats = _by_torch(x, branch, weight, bias, EPS, torch.float32)
    arguments = (upstream[0], upstream[1], total, weight, stats, bias is not None, False)
    grad_x, _, *rest = _by_torch_backward(*arguments)
    expected = evaluate(add_norm_reference, (x, branch, weight, bias), upstream)
    found = [total, y, grad_x, grad_x, *rest]
    for a, b in zip(found, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_deterministic(dtype, norm, threads):
    tensors = inputs((700, 70), norm, dtype)
    upstream = torch.randn(2, 700, 70)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(evaluate(add_norm, tensors, upstream, dtype=dtype))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)
    # A row's bits are its own.
    rows = slice(333, 336)
    part = [t[rows] for t in tensors[:2]] + list(tensors[2:])
    alone = evaluate(add_norm, part, upstream[:, rows], dtype=dtype)
    for a, b in zip(alone[:4], results[0][:4], strict=True):
        assert_same_bits(a, b[rows])


@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_on_every_level_with_fma(dtype, norm):
    tensors, upstream = inputs((9, 517), norm, dtype), torch.randn(2, 9, 517)
    best, results = _C.build_info()["isa"], []
    for level in _C.isa_levels()[1:]:
        _C.set_isa(level)
        results.append(evaluate(add_norm, tensors, upstream, dtype=dtype))
    _C.set_isa(best)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)


def test_identities(device):
    x, branch, weight, bias = inputs((20, 300), "layer", device=device)
    one, zero = torch.ones_like(weight), torch.zeros_like(bias)
    # A row of y has mean square 1; LayerNorm's also mean 0, whatever is added to all of it.
    _, y = add_norm(x, branch, one, eps=0.0)
    assert torch.allclose(y.square().mean(1), torch.ones(20, device=device), rtol=1e-5)
    _, y = add_norm(x, branch, one, zero, eps=0.0)
    assert y.mean(1).abs().max() < 1e-6
    assert torch.allclose(add_norm(x + 3, branch, one, zero, eps=0.0)[1], y, atol=1e-5)
    # A scale of the row changes nothing, so the gradient is at right angles to it.
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(add_norm(leaf, None, weight, eps=0.0)[1].square().sum(), leaf)
    assert (grad * x).sum(1).abs().max() < 1e-4 * grad.norm(dim=1).max() * x.norm(dim=1).max()
    # NaN and infinities stay in their row.
    bad = x.clone()
    bad[3, 5], bad[4, 6] = torch.nan, torch.inf
    _, y = add_norm(bad, branch, weight, bias, eps=EPS)
    assert y[3].isnan().all() and y[4].isnan().all()
    kept = [0, 1, 2, *range(5, 20)]
    assert_same_bits(y[kept], add_norm(x, branch, weight, bias, eps=EPS)[1][kept])


def test_opcheck_and_compile(device):
    x, branch, weight, bias = inputs((5, 33), "layer", torch.bfloat16, device)
    ops, wide, narrow = torch.ops.instructcore, torch.float32, torch.bfloat16
    torch.library.opcheck(ops.add_norm.default, (x, branch, weight, bias, EPS, narrow))
    torch.library.opcheck(ops.add_norm.default, (x, None, weight, None, EPS, wide))
    total, y, stats = ops.add_norm.default(x, branch, weight, bias, EPS, narrow)
    backward = ops.add_norm_backward.default
    torch.library.opcheck(backward, (total, y, total, weight, stats, True, True))
    torch.library.opcheck(backward, (None, y, total, weight, stats, False, False))

    def loss(x, branch):
        total, y = add_norm(2 * x, branch, weight, bias, eps=EPS)
        return (total.sin() + y.cos()).sum()

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, branch)]
        value = f(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_rejects(device):
    x, branch, weight, bias = inputs((4, 9), "layer", device=device)

    def call(x=x, branch=branch, weight=weight, **options):
        return add_norm(x, branch, weight, bias, eps=EPS, **options)

    with pytest.raises(TypeError, match="add_norm: x must be float32.*float64"):
        call(x.double())
    with pytest.raises(TypeError, match="add_norm: x must be float32 where there is a branch"):
        call(x.half())
    with pytest.raises(TypeError, match="add_norm: weight must be torch.float32"):
        call(weight=weight.half())
    with pytest.raises(TypeError, match="add_norm: dtype must be float32"):
        call(dtype=torch.float64)
    with pytest.raises(ValueError, match=r"add_norm: x must be \(N, C\)"):
        call(x[0], None)
    with pytest.raises(ValueError, match=r"add_norm: branch must be \(4, 9\)"):
        call(branch=branch[:2])
    with pytest.raises(ValueError, match=r"add_norm: weight must be \(9,\)"):
        call(weight=weight[:3])


@pytest.mark.parametrize("branch", [True, False], ids=["branch", "alone"])
def test_double_backward(branch):
    x, other, weight, bias = inputs((4, 9), "layer", branch=branch)

    def loss(x):
        total, y = add_norm(x, other, weight, bias, eps=EPS)
        return y.sum() + total.sum()

    assert_differentiable_once("add_norm", loss, x)
