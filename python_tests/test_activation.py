from __future__ import annotations

import math

import pytest
import torch
from tolerance import assert_close, assert_differentiable_once, assert_same_bits

from instructcore import _C
from instructcore.ops import gelu, gelu_reference, swiglu, swiglu_reference

FUNCTIONS = {"swiglu": (swiglu, swiglu_reference), "gelu": (gelu, gelu_reference)}
# The input's shape and why
SHAPES = {
    (1, 2): "one gate",
    (7,): "no rows; an odd width only without a gate",
    (3, 97, 66): "more dimensions; 33 gates, a tail of one lane",
    (2, 2048): "whole vectors",
    (300, 194): "more rows than a piece holds, tails of one and two lanes",
    (0, 6): "no rows",
    (5, 0): "rows of nothing",
}


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    """On a GPU these ops are torch's, which the emulator knows nothing of."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(params=list(FUNCTIONS))
def name(request) -> str:
    return request.param


def gradient(f, x, upstream):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x, upstream.to(x.dtype))[0]


def test_known_values():
    # silu(ln 3) = ln 3 / (1 + 1/3), silu(0) = 0; silu'(0) = 1/2.
    x = torch.tensor([[math.log(3), 0.0, 2.0, 5.0]], requires_grad=True)
    out = swiglu(x)
    assert out.tolist()[0] == pytest.approx([1.5 * math.log(3), 0.0])
    out.sum().backward()
    slope = 3 / 4 + math.log(3) * 3 / 16
    assert x.grad.tolist()[0] == pytest.approx([2 * slope, 2.5, 0.75 * math.log(3), 0.0])
    # gelu(1) = (1 + tanh(0.7978845608 * 1.044715)) / 2 = 0.8411920.
    x = torch.tensor([1.0, 0.0, -1.0], requires_grad=True)
    out = gelu(x)
    assert out.tolist() == pytest.approx([0.8411920, 0.0, 0.8411920 - 1])
    out.sum().backward()
    assert x.grad.tolist() == pytest.approx([1.0829641, 0.5, 1 - 1.0829641])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "wider", "every_other"])
def test_matches_reference(device, dtype, name, shape, layout, isa):
    if name == "swiglu" and shape == (7,):
        shape = (14,)
    ours, reference = FUNCTIONS[name]
    x = (3 * torch.randn(shape)).to(device, dtype)
    if layout == "wider":  # a row stride
        x = torch.cat((x, x), -1)[..., : shape[-1]]
    if layout == "every_other":
        x = x.repeat_interleave(2, -1)[..., ::2]
    before = x.clone()
    out = ours(x)
    assert out.dtype == dtype and out.is_contiguous()
    assert_close(out, reference(x), reference(x.double()))
    assert_same_bits(x, before, "the input")


@pytest.mark.parametrize("shape", [(1, 2), (3, 97, 66), (300, 194)], ids=str)
def test_gradients(device, dtype, name, shape, isa):
    ours, reference = FUNCTIONS[name]
    x = (3 * torch.randn(shape)).to(device, dtype)
    upstream = torch.randn_like(reference(x))
    truth = gradient(reference, x.double(), upstream)
    found = gradient(ours, x, upstream)
    assert found.dtype == dtype
    assert_close(found, gradient(reference, x, upstream), truth)
    # A gradient without memory of its own, as sum() makes it.
    one = torch.ones((), dtype=dtype, device=device).expand(upstream.shape)
    assert_same_bits(gradient(ours, x, one), gradient(ours, x, one.clone()))


def test_deterministic(dtype, name, threads):
    """An element's bits are those it has alone, wherever it lies."""
    f, _ = FUNCTIONS[name]
    x = 3 * torch.randn(259, 70).to(dtype)
    upstream = torch.randn(259, 70 // (2 if name == "swiglu" else 1)).to(dtype)
    out, grad = f(x), gradient(f, x, upstream)
    for n in (1, 2, 3):
        threads(n)
        assert_same_bits(f(x), out)
        assert_same_bits(gradient(f, x, upstream), grad)
    columns = slice(3, 4)
    if name == "swiglu":
        pick = torch.cat((x[:, :35][:, columns], x[:, 35:][:, columns]), 1)
        grad = torch.cat((grad[:, :35][:, columns], grad[:, 35:][:, columns]), 1)
    else:
        pick, grad = x[:, columns], grad[:, columns]
    assert_same_bits(f(pick), out[:, columns])
    assert_same_bits(gradient(f, pick, upstream[:, columns]), grad)
    assert_same_bits(f(x[100:101]), out[100:101])


def test_same_bits_on_every_level_with_fma(dtype, name):
    f, _ = FUNCTIONS[name]
    x = 3 * torch.randn(9, 518).to(dtype)
    upstream = torch.randn_like(f(x))
    best, results = _C.build_info()["isa"], []
    for level in _C.isa_levels()[1:]:
        _C.set_isa(level)
        results.append((f(x), gradient(f, x, upstream)))
    _C.set_isa(best)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)


def test_identities(device):
    x = torch.linspace(-9, 9, 1001, device=device)
    # x sigmoid(u) + x sigmoid(-u) = x: f(x) - f(-x) = x.
    assert torch.allclose(gelu(x) - gelu(-x), x, atol=1e-6)
    one = torch.ones_like(x)
    silu, mirrored = swiglu(torch.stack((x, one), 1)), swiglu(torch.stack((-x, one), 1))
    assert torch.allclose((silu - mirrored)[:, 0], x, atol=1e-6)
    # Far out they are x and 0; NaN and what infinities make stay what they are in torch.
    far = torch.tensor([1e4, -1e4, 1e15, -1e15, torch.inf, -torch.inf, torch.nan], device=device)
    for f, reference in FUNCTIONS.values():
        y = far if f is gelu else torch.stack((far, torch.ones_like(far)), 1)
        ours, expected = f(y), reference(y)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-30, equal_nan=True)
        one = torch.ones_like(expected)
        ours, expected = gradient(f, y, one), gradient(reference, y, one)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-30, equal_nan=True)


def test_opcheck_and_compile(device, name):
    f, gated = FUNCTIONS[name][0], name == "swiglu"
    x = torch.randn(5, 34, device=device)
    op = torch.ops.instructcore
    torch.library.opcheck(op.activation.default, (x, gated))
    torch.library.opcheck(op.activation_backward.default, (f(x), x, gated))
    results = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        out = g(leaf)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_rejects(device, name):
    f, _ = FUNCTIONS[name]
    with pytest.raises(TypeError, match=f"{name}: .* must be float32, bfloat16 or float16, got"):
        f(torch.ones(2, 4, device=device).double())
    with pytest.raises(ValueError, match=rf"{name}: .* must be \(\.\.\., 2?F\), got"):
        f(torch.ones((2, 3) if name == "swiglu" else (), device=device))


def test_double_backward(dtype, name):
    f, _ = FUNCTIONS[name]
    assert_differentiable_once("activation", lambda x: f(x).sum(), torch.randn(4, 6).to(dtype))
