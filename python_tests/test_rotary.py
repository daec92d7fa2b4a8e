from __future__ import annotations

import math

import pytest
import torch
from tolerance import assert_close, assert_differentiable_once, assert_same_bits

from instructcore import _C
from instructcore.ops import attention_paged_, rotary, rotary_reference

# (N, H, D), how many heads turn, and why
SHAPES = {
    (1, 1, 2): (1, "one pair"),
    (7, 3, 8): (2, "half a vector; a head that does not turn"),
    (97, 5, 40): (3, "a tail of half a vector; of a quarter where pairs lie apart"),
    (1025, 2, 64): (2, "more tokens than a piece holds"),
    (5, 2, 256): (0, "the widest head; none turns"),
    (0, 2, 16): (1, "no tokens"),
}
POSITIONS = 300


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    """On a GPU this op is torch's, which the emulator knows nothing of."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(params=[True, False], ids=["interleaved", "halves"])
def interleaved(request) -> bool:
    return request.param


def inputs(shape, dtype=torch.float32, device="cpu"):
    """x, cos, sin, positions; x is part of a wider tensor."""
    tokens, heads, dim = shape
    x = torch.randn(tokens, heads + 1, dim).to(device, dtype)[:, 1:]
    angles = torch.rand(POSITIONS, dim // 2) * 7
    positions = torch.randint(POSITIONS, (tokens,)).int()
    return x, angles.cos().to(device), angles.sin().to(device), positions.to(device)


def double(x, cos, sin, positions):
    return x.double(), cos.double(), sin.double(), positions


def test_known_values():
    x = torch.tensor([[[3.0, 4.0, 1.0, 0.0]]])
    cos, sin = torch.tensor([[9.0, 9.0], [0.6, 0.0]]), torch.tensor([[9.0, 9.0], [0.8, 1.0]])
    at = torch.tensor([1]).int()
    # 3 * 0.6 - 4 * 0.8, 4 * 0.6 + 3 * 0.8; a quarter turn of (1, 0).
    assert rotary(x, cos, sin, at)[0, 0].tolist() == pytest.approx([-1.4, 4.8, 0.0, 1.0])
    # Pairs (3, 1) and (4, 0).
    halves = rotary(x, cos, sin, at, interleaved=False)
    assert halves[0, 0].tolist() == pytest.approx([1.0, 0.0, 3.0, 4.0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(device, dtype, shape, interleaved, isa):
    heads, _ = SHAPES[shape]
    arguments, options = inputs(shape, dtype, device), dict(heads=heads, interleaved=interleaved)
    out, expected = rotary(*arguments, **options), rotary_reference(*arguments, **options)
    assert out.dtype == dtype and out.is_contiguous()
    assert_close(out, expected, rotary_reference(*double(*arguments), **options))
    if device == "cpu":
        assert_same_bits(out, expected)  # every product and sum rounds by itself in both


@pytest.mark.parametrize("shape", [(7, 3, 8), (97, 5, 40)], ids=str)
def test_gradients(device, dtype, shape, interleaved):
    heads, _ = SHAPES[shape]
    x, *tables = inputs(shape, dtype, device)
    options = dict(heads=heads, interleaved=interleaved)
    upstream = torch.randn(shape).to(device, dtype)

    def gradient(f, x, *tables):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(f(leaf, *tables, **options), leaf, upstream.to(x.dtype))[0]

    truth = gradient(rotary_reference, *double(x, *tables))
    assert_close(gradient(rotary, x, *tables), gradient(rotary_reference, x, *tables), truth)


def test_deterministic(dtype, interleaved, threads):
    """A token's bits are those it has alone."""
    x, *tables, positions = inputs((1025, 3, 40), dtype)
    options = dict(heads=2, interleaved=interleaved)
    out = rotary(x, *tables, positions, **options)
    for n in (1, 2, 3):
        threads(n)
        assert_same_bits(rotary(x, *tables, positions, **options), out)
    for i in (0, 500, 1024):
        alone = rotary(x[i : i + 1], *tables, positions[i : i + 1], **options)
        assert_same_bits(alone, out[i : i + 1])


@pytest.mark.parametrize("dim", [8, 40, 64])
def test_same_bits_as_in_the_paged_cache(dtype, dim, interleaved):
    tokens, heads, kv_heads = 70, 4, 2
    qkv, cos, sin, _ = inputs((tokens, heads + 2 * kv_heads, dim), dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    held = 33
    caches = [torch.zeros(1, held + tokens, kv_heads, dim, dtype=dtype) for _ in range(2)]
    tables = torch.zeros(1, 1).int(), torch.tensor([held]).int(), torch.tensor([0, tokens]).int()
    options = dict(cos=cos, sin=sin, interleaved=interleaved)
    attention_paged_(q, *caches, *tables, k_new=k, v_new=v, **options)
    turned = rotary(k, cos, sin, torch.arange(held, held + tokens).int(), interleaved=interleaved)
    assert_same_bits(caches[0][0, held:], turned)


def test_identities(device, interleaved):
    x, cos, sin, positions = inputs((50, 2, 16), device=device)
    options = dict(interleaved=interleaved)
    out = rotary(x, cos, sin, positions, **options)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))  # a turn keeps lengths
    back = rotary(out, cos, -sin, positions, **options)
    torch.testing.assert_close(back, x, atol=1e-6, rtol=1e-5)
    # Turning by one angle after another is turning by their sum.
    angle = torch.full((1, 8), math.pi / 3, device=device)
    at = torch.zeros(50, dtype=torch.int32, device=device)
    twice = x
    for _ in range(6):
        twice = rotary(twice, angle.cos(), angle.sin(), at, **options)
    torch.testing.assert_close(twice, x, atol=1e-5, rtol=1e-5)


def test_opcheck_and_compile(device):
    x, *tables = inputs((5, 3, 8), device=device)
    op = torch.ops.instructcore.rotary.default
    torch.library.opcheck(op, (x, *tables, 2, True, False))

    def f(x):
        return rotary(x, *tables, heads=2)

    results = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        out = g(leaf)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_rejects(device):
    x, cos, sin, positions = inputs((5, 3, 8), device=device)
    with pytest.raises(TypeError, match="rotary: x must be float32, bfloat16 or float16, got"):
        rotary(x.double(), cos, sin, positions)
    with pytest.raises(ValueError, match=r"rotary: x must be \(N, H, D\), D even and at most 256"):
        rotary(x[..., :5], cos, sin, positions)
    with pytest.raises(ValueError, match=r"rotary: cos must be \(positions, D / 2\), got"):
        rotary(x, cos[:, :3], sin, positions)
    with pytest.raises(TypeError, match="rotary: positions must be torch.int32, got torch.int64"):
        rotary(x, cos, sin, positions.long())
    with pytest.raises(ValueError, match=r"rotary: heads must be in 0 \.\. 3, got 4"):
        rotary(x, cos, sin, positions, heads=4)
    if device == "cpu":
        with pytest.raises(IndexError, match=r"rotary: positions must be in \[0, 300\), got 300"):
            rotary(x, cos, sin, torch.full_like(positions, 300))


def test_double_backward():
    x, *tables = inputs((5, 3, 8))
    assert_differentiable_once("rotary", lambda x: rotary(x, *tables).sum(), x.contiguous())


def test_same_bits_on_every_level(dtype, interleaved):
    x, *tables = inputs((9, 3, 40), dtype)
    best, results = _C.build_info()["isa"], []
    for level in _C.isa_levels():
        _C.set_isa(level)
        results.append(rotary(x, *tables, interleaved=interleaved))
    _C.set_isa(best)
    for other in results[1:]:
        assert_same_bits(other, results[0])
