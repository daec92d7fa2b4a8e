from __future__ import annotations

import math

import pytest
import torch
from tolerance import assert_close, assert_differentiable_once, assert_same_bits

from instructcore import _C
from instructcore.ops import attention_paged_, rotary, rotary_reference
from instructcore.ops.rotary import _by_torch

# (N, heads, kv_heads, D) and why
SHAPES = {
    (1, 1, 1, 2): "one pair",
    (5, 3, 1, 24): "grouped heads, a vector and a half",
    (300, 4, 2, 64): "more tokens than a piece holds",
    (3, 2, 2, 70): "a tail of three pairs",
    (0, 2, 1, 16): "no tokens",
    (3, 2, 1, 0): "no pairs",
}


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    """On a GPU this op is torch's, which the emulator knows nothing of."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def inputs(shape, dtype=torch.float32, device="cpu"):
    tokens, heads, kv_heads, dim = shape
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim).to(device, dtype)
    angles = torch.outer(torch.arange(50.0), torch.rand(dim // 2)).to(device)
    positions = torch.randint(0, 50, (tokens,), dtype=torch.int32, device=device)
    named = {"heads": heads, "kv_heads": kv_heads}
    return (qkv, angles.cos(), angles.sin(), positions), named


def gradient(f, tensors, named, upstream):
    leaf = tensors[0].detach().requires_grad_()
    out = f(leaf, *tensors[1:], **named)
    return torch.autograd.grad(out, leaf, [u.to(leaf.dtype) for u in upstream])[0]


def test_known_values():
    # A quarter turn takes (1, 2) to (-2, 1); position 0 stays; the value is not touched.
    angles = torch.tensor([[0.0], [math.pi / 2]])
    qkv = torch.tensor([1.0, 2.0]).expand(2, 3, 2).clone().requires_grad_()
    positions = torch.tensor([1, 0], dtype=torch.int32)
    q, k, v = rotary(qkv, angles.cos(), angles.sin(), positions, heads=1, kv_heads=1)
    assert q[0, 0].tolist() == pytest.approx([-2.0, 1.0]) and k.tolist() == q.tolist()
    assert q[1, 0].tolist() == [1.0, 2.0] and v.tolist() == qkv[:, 2:].tolist()
    # The gradient turns back.
    grads = [torch.tensor([3.0, 5.0]).expand(2, 1, 2)] * 3
    (grad,) = torch.autograd.grad((q, k, v), qkv, grads)
    assert grad[0, 0].tolist() == pytest.approx([5.0, -3.0]) and grad[0, 2].tolist() == [3.0, 5.0]
    assert grad[1].tolist() == [[3.0, 5.0]] * 3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(device, dtype, shape, isa):
    tensors, named = inputs(shape, dtype, device)
    ours = rotary(*tensors, **named)
    native = rotary_reference(*tensors, **named)
    truth = rotary_reference(tensors[0].double(), *tensors[1:], **named)
    for a, b, c in zip(ours, native, truth, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, c)
    wide = torch.cat((tensors[0], tensors[0]), 1)[:, : tensors[0].shape[1]]  # a row stride
    for a, b in zip(rotary(wide, *tensors[1:], **named), ours, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(device, dtype, shape, isa):
    tensors, named = inputs(shape, dtype, device)
    upstream = [torch.randn_like(x) for x in rotary(*tensors, **named)]
    ours = gradient(rotary, tensors, named, upstream)
    native = gradient(rotary_reference, tensors, named, upstream)
    wide = (tensors[0].double(), *tensors[1:])
    assert_close(ours, native, gradient(rotary_reference, wide, named, upstream))
    one = [torch.ones((), dtype=dtype, device=device).expand(u.shape) for u in upstream]
    copied = [u.clone() for u in one]
    assert_same_bits(
        gradient(rotary, tensors, named, one), gradient(rotary, tensors, named, copied)
    )


def test_by_torch():
    """What runs on CUDA, here on the CPU."""
    (qkv, cos, sin, positions), named = inputs((5, 3, 1, 24))
    out = torch.empty(5, 3, 24)
    _by_torch(qkv[:, :3], cos, sin, positions, out)
    expected = rotary_reference(qkv, cos, sin, positions, **named)[0]
    torch.testing.assert_close(out, expected)


def test_deterministic(dtype, threads):
    tensors, named = inputs((700, 4, 2, 24), dtype)
    upstream = [torch.randn_like(x) for x in rotary(*tensors, **named)]
    results = []
    for n in (1, 2, 3):
        threads(n)
        grad = gradient(rotary, tensors, named, upstream)
        results.append((*rotary(*tensors, **named), grad))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)
    # A token's bits are its own.
    qkv, cos, sin, positions = tensors
    alone = rotary(qkv[33:34], cos, sin, positions[33:34], **named)
    for a, b in zip(alone, results[0][:3], strict=True):
        assert_same_bits(a, b[33:34])


def test_same_bits_on_every_level(dtype):
    """Without fused multiply-adds all levels agree."""
    tensors, named = inputs((9, 4, 2, 24), dtype)
    best, results = _C.build_info()["isa"], []
    for level in _C.isa_levels():
        _C.set_isa(level)
        results.append(rotary(*tensors, **named))
    _C.set_isa(best)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)


def test_same_bits_as_in_the_cache():
    """attention_paged_ turns the keys that it appends in the same way."""
    (qkv, cos, sin, positions), named = inputs((1, 2, 1, 24))
    positions[0] = 9
    q, k, v = rotary(qkv, cos, sin, positions, **named)
    keys, values = torch.zeros(1, 16, 1, 24), torch.zeros(1, 16, 1, 24)
    table, held = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([9], dtype=torch.int32)
    cu = torch.tensor([0, 1], dtype=torch.int32)
    new = {"k_new": qkv[:, 2:3], "v_new": v, "cos": cos, "sin": sin, "interleaved": True}
    attention_paged_(qkv[:, :2], keys, values, table, held, cu, **new)
    assert_same_bits(keys[0, 9], k[0])


def test_identities(device):
    (qkv, cos, sin, positions), named = inputs((40, 2, 2, 64), device=device)
    q, k, _ = rotary(qkv, cos, sin, positions, **named)
    # Lengths stay, and a product of q and k depends on the distance of their positions alone.
    assert torch.allclose(q.norm(dim=-1), qkv[:, :2].norm(dim=-1), rtol=1e-5)
    fixed = torch.full_like(positions, 7)
    _, there, _ = rotary(qkv, cos, sin, fixed, **named)
    later, _, _ = rotary(qkv, cos, sin, fixed + 5, **named)
    _, base, _ = rotary(qkv, cos, sin, fixed * 0, **named)
    moved, _, _ = rotary(qkv, cos, sin, fixed * 0 + 5, **named)
    products = [(a * b).sum(-1) for a, b in ((later, there), (moved, base))]
    assert torch.allclose(*products, atol=1e-4)


def test_opcheck_and_compile(device):
    tensors, named = inputs((5, 3, 1, 24), torch.bfloat16, device)
    ops = torch.ops.instructcore
    torch.library.opcheck(ops.rotary.default, (*tensors, 4))
    grads = rotary(*tensors, **named)
    torch.library.opcheck(ops.rotary_backward.default, (*grads, *tensors[1:]))

    def loss(qkv):
        q, k, v = rotary(2 * qkv, *tensors[1:], **named)
        return q.sin().sum() + k.cos().sum() + v.square().sum()

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = tensors[0].clone().requires_grad_()
        value = f(leaf)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_rejects(device):
    (qkv, cos, sin, positions), named = inputs((5, 3, 1, 24), device=device)
    with pytest.raises(TypeError, match="rotary: qkv must be float32.*float64"):
        rotary(qkv.double(), cos, sin, positions, **named)
    with pytest.raises(TypeError, match="rotary: positions must be torch.int32"):
        rotary(qkv, cos, sin, positions.long(), **named)
    with pytest.raises(ValueError, match="rotary: qkv must have 6 heads"):
        rotary(qkv, cos, sin, positions, heads=4, kv_heads=1)
    with pytest.raises(ValueError, match=r"rotary: qkv must be \(N, heads"):
        rotary(qkv[..., :23], cos, sin, positions, **named)
    with pytest.raises(ValueError, match=r"rotary: cos and sin must be \(P, 12\)"):
        rotary(qkv, cos[:, :5], sin, positions, **named)
    with pytest.raises(ValueError, match=r"rotary: positions must be \(5,\)"):
        rotary(qkv, cos, sin, positions[:3], **named)
    if device == "cpu":
        for bad in (-1, 50):
            positions[2] = bad
            with pytest.raises(RuntimeError, match=r"positions must be in \[0, 50\), got .* at 2"):
                rotary(qkv, cos, sin, positions, **named)


def test_double_backward(dtype):
    tensors, named = inputs((4, 3, 1, 8), dtype)

    def loss(qkv):
        return sum(x.sum() for x in rotary(qkv, *tensors[1:], **named))

    assert_differentiable_once("rotary", loss, tensors[0])
