from __future__ import annotations

import math

import pytest
import torch
from tolerance import assert_close, assert_differentiable_once, assert_same_bits

from instructcore import _C
from instructcore.ops import token_logprobs, token_logprobs_reference

# (N, V) and why
SHAPES = {
    (1, 1): "a single class: log-probability and entropy 0",
    (3, 2): "two classes",
    (5, 97): "odd, no whole vector of 16 at the end",
    (97, 259): "a byte vocabulary; more rows than a piece holds",
    (4, 2049): "one logit past a block",
    (3, 50257): "GPT-2's vocabulary: many blocks, rows not aligned",
    (0, 7): "no rows",
}


def inputs(shape, dtype=torch.float32, device="cpu"):
    rows, vocab = shape
    logits = (3 * torch.randn(rows, vocab)).to(device, dtype)
    targets = torch.randint(0, vocab, (rows,), device=device)
    targets[::2] = logits[::2].argmax(-1)
    mask = torch.rand(rows, device=device) > 0.2
    temperature = 0.3 + torch.rand(rows, device=device)
    return logits, targets, mask, temperature


def gradient(f, logits, targets, upstream, dtype=None, **options):
    x = logits.detach().to(dtype or logits.dtype).requires_grad_()
    out = f(x, targets, **options)
    loss = (out.logprobs * upstream[0].to(out.logprobs.dtype)).sum()
    if out.entropy is not None:
        loss = loss + (out.entropy * upstream[1].to(loss.dtype)).sum()
    return torch.autograd.grad(loss, x)[0]


def test_known_values():
    # p = 1/8, 2/8, 5/8: lse = ln 8, H = 1/8 ln 8 + 1/4 ln 4 + 5/8 ln 8/5.
    logits = torch.tensor([1.0, 2.0, 5.0]).log().repeat(3, 1)
    out = token_logprobs(logits, torch.tensor([1, 2, -100]))
    entropy = math.log(8) / 8 + math.log(4) / 4 + 5 / 8 * math.log(8 / 5)
    assert out.logprobs.tolist() == pytest.approx([-math.log(4), math.log(5 / 8), 0], rel=1e-6)
    assert out.entropy.tolist() == pytest.approx([entropy, entropy, 0], rel=1e-6)
    assert out.lse.tolist() == pytest.approx([math.log(8), math.log(8), 0], rel=1e-6)
    assert out.top1.tolist() == [False, True, False]
    # Temperature 1/2 squares the weights: p = 1/30, 4/30, 25/30.
    out = token_logprobs(logits, torch.tensor([0, 1, 2]), temperature=0.5, entropy=False)
    expected = [math.log(x / 30) for x in (1, 4, 25)]
    assert out.logprobs.tolist() == pytest.approx(expected, rel=1e-6)
    assert out.entropy is None
    # Of equal logits the lowest index is top-1.
    flat = token_logprobs(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))
    assert flat.top1.tolist() == [True, False, False, True]
    assert flat.entropy.tolist() == pytest.approx([math.log(3)] * 4)
    # d logprob / dx = [j = t] - p; dH / dx = -p (ln p + H).
    x = torch.tensor([[1.0, 3.0]]).log().requires_grad_()
    out = token_logprobs(x, torch.tensor([0]))
    (grad,) = torch.autograd.grad(out.logprobs, x, torch.ones(1), retain_graph=True)
    assert grad[0].tolist() == pytest.approx([0.75, -0.75])
    (grad,) = torch.autograd.grad(out.entropy, x, torch.ones(1))
    slope = 3 / 16 * math.log(3)
    assert grad[0].tolist() == pytest.approx([slope, -slope])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "per row", "no entropy"])
def test_matches_reference(device, dtype, shape, form, isa):
    logits, targets, mask, temperature = inputs(shape, dtype, device)
    options = {
        "plain": {},
        "per row": {"mask": mask, "temperature": temperature},
        "no entropy": {"entropy": False, "temperature": 0.7},
    }[form]
    ours = token_logprobs(logits, targets, **options)
    native = token_logprobs_reference(logits, targets, **options)
    truth = token_logprobs_reference(logits.double(), targets, **options)
    for name in ("logprobs", "lse", *(() if form == "no entropy" else ("entropy",))):
        a, b, c = (getattr(x, name) for x in (ours, native, truth))
        assert a.dtype == torch.float32
        assert_close(a, b, c, name=name)
    assert torch.equal(ours.top1, truth.top1)
    assert (ours.logprobs <= 0).all()


def test_strides(device, dtype):
    logits, targets, mask, temperature = inputs((6, 131), dtype, device)
    options = {"mask": mask, "temperature": temperature}
    wide = torch.nn.functional.pad(logits, (3, 10), value=float("nan"))
    upstream = torch.randn(2, 6, device=device)
    for view in (wide[:, 3:-10], logits.repeat_interleave(2, 0)[::2], logits.T.contiguous().T):
        pairs = zip(
            token_logprobs(view, targets, **options),
            token_logprobs(logits, targets, **options),
            strict=True,
        )
        for a, b in pairs:
            assert_same_bits(a, b)
        assert_same_bits(
            gradient(token_logprobs, view, targets, upstream, **options),
            gradient(token_logprobs, logits, targets, upstream, **options),
        )
    # Per-row arguments may be strided, too.
    every = [x.repeat_interleave(2)[::2] for x in (targets, mask, temperature)]
    again = token_logprobs(logits, every[0], mask=every[1], temperature=every[2])
    assert_same_bits(again.logprobs, token_logprobs(logits, targets, **options).logprobs)


@pytest.mark.parametrize("form", ["plain", "per row", "no entropy"])
@pytest.mark.parametrize("shape", [(33, 259), (3, 5003)], ids=str)
def test_gradients(device, dtype, shape, form, isa):
    logits, targets, mask, temperature = inputs(shape, dtype, device)
    options = {
        "plain": {},
        "per row": {"mask": mask, "temperature": temperature},
        "no entropy": {"entropy": False, "temperature": 0.7},
    }[form]
    upstream = torch.randn(2, shape[0], device=device)
    before = logits.clone()
    ours = gradient(token_logprobs, logits, targets, upstream, **options)
    native = gradient(token_logprobs_reference, logits, targets, upstream, **options)
    truth = gradient(token_logprobs_reference, logits, targets, upstream, torch.float64, **options)
    assert ours.dtype == dtype
    assert_close(ours, native, truth)
    assert_same_bits(logits, before, "the logits")
    if form == "per row":
        assert ours[~mask].eq(0).all()
    # One of the two alone.
    x = logits.clone().requires_grad_()
    out = token_logprobs(x, targets, **options)
    (alone,) = torch.autograd.grad(out.logprobs, x, upstream[0])
    y = logits.double().requires_grad_()
    (expected,) = torch.autograd.grad(
        token_logprobs_reference(y, targets, **options).logprobs, y, upstream[0].double()
    )
    assert_close(alone, expected.to(dtype), expected)


def test_deterministic(device, dtype, threads):
    logits, targets, mask, temperature = inputs((300, 1025), dtype, device)
    options = {"mask": mask, "temperature": temperature}
    upstream = torch.randn(2, 300, device=device)
    results = []
    for n in (1, 2, 3):
        threads(n)
        out = token_logprobs(logits, targets, **options)
        results.append((*out, gradient(token_logprobs, logits, targets, upstream, **options)))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)
    # A row's bits are its own, and the same whether or not the entropy is asked for.
    one = token_logprobs(logits[7:8], targets[7:8], temperature=temperature[7:8], entropy=False)
    every = token_logprobs(logits, targets, temperature=temperature)
    assert_same_bits(one.logprobs, every.logprobs[7:8])
    assert_same_bits(one.lse, every.lse[7:8])


def test_same_bits_on_every_level_with_fma(dtype):
    logits, targets, _, temperature = inputs((9, 5003), dtype)
    upstream = torch.randn(2, 9)
    best, results = _C.build_info()["isa"], []
    for level in _C.isa_levels()[1:]:
        _C.set_isa(level)
        results.append(
            (
                *token_logprobs(logits, targets, temperature=temperature),
                gradient(token_logprobs, logits, targets, upstream, temperature=temperature),
            )
        )
    _C.set_isa(best)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)


def test_identities(device):
    logits, targets, mask, _ = inputs((50, 777), device=device)
    out = token_logprobs(logits, targets)
    # At most 0, also where the target is certain; entropy between 0 and ln V.
    sure = 100 * torch.nn.functional.one_hot(targets, 777).float()
    assert (token_logprobs(sure, targets).logprobs <= 0).all()
    assert token_logprobs(sure, targets).entropy.abs().max() < 1e-30
    assert (out.entropy >= 0).all() and (out.entropy <= math.log(777)).all()
    # A temperature is a scale of the logits.
    scaled = token_logprobs(4 * logits, targets, temperature=4.0)
    assert torch.allclose(scaled.logprobs, out.logprobs, rtol=1e-6)
    assert torch.allclose(scaled.entropy, out.entropy, rtol=1e-5)
    # The probabilities of all targets sum to 1.
    each = token_logprobs(logits[:1].expand(777, -1), torch.arange(777, device=device))
    assert each.logprobs.double().exp().sum().item() == pytest.approx(1, abs=1e-6)
    assert each.top1.sum() == 1 and each.top1[logits[0].argmax()]
    # Masked rows may hold anything, also a wrong target and temperature; they give 0.
    dirty, wrong = logits.clone(), targets.clone()
    dirty[~mask], wrong[~mask] = float("nan"), 10**6
    temperature = torch.where(mask, 1.0, -1.0)
    masked = token_logprobs(dirty, wrong, mask=mask, temperature=temperature)
    for a, b in zip(masked, out, strict=True):
        assert_same_bits(a[mask], b[mask])
        assert a[~mask].eq(0).all()
    # A masked vocabulary is as good as a smaller one.
    wide = torch.full((50, 5000), -torch.inf, device=device)
    wide[:, 3000:3777] = logits
    upstream = torch.randn(2, 50, device=device)
    for a, b in zip(token_logprobs(wide, targets + 3000), out, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-5)
    grad = gradient(token_logprobs, wide, targets + 3000, upstream)
    assert torch.allclose(
        grad[:, 3000:3777],
        gradient(token_logprobs, logits, targets, upstream),
        rtol=1e-4,
        atol=1e-7,
    )
    assert grad[:, :3000].eq(0).all() and grad[:, 3777:].eq(0).all()


def test_opcheck_and_compile(device):
    logits, targets, mask, temperature = inputs((5, 33), device=device)
    ops = torch.ops.instructcore
    forward, backward = ops.token_logprobs.default, ops.token_logprobs_backward.default
    torch.library.opcheck(forward, (logits, targets, temperature, mask, True, -100))
    torch.library.opcheck(forward, (logits, targets, temperature[0], None, False, -100))
    _, entropy, _, _, stats = forward(logits, targets, temperature, mask, True, -100)
    upstream = torch.randn(2, 5, device=device)
    rest = (logits, targets, temperature, mask, entropy, stats, -100)
    torch.library.opcheck(backward, (*upstream, *rest))
    torch.library.opcheck(backward, (upstream[0], None, *rest))

    def loss(x, t, m):
        out = token_logprobs(2 * x, t, mask=m, temperature=0.8)
        return (out.logprobs + 0.1 * out.entropy).sum()

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = logits.clone().requires_grad_()
        value = f(x, targets, mask)
        value.backward()
        results.append((value.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def test_rejects(device, backend):
    logits, targets, mask, temperature = inputs((4, 9), device=device)

    def call(x=logits, t=targets, **options):
        return token_logprobs(x, t, **options)

    with pytest.raises(TypeError, match="token_logprobs: logits must be float32.*float64"):
        call(logits.double())
    with pytest.raises(TypeError, match="token_logprobs: targets must be torch.int64"):
        call(t=targets.int())
    with pytest.raises(TypeError, match="token_logprobs: mask must be torch.bool"):
        call(mask=mask.int())
    with pytest.raises(ValueError, match=r"token_logprobs: logits must be \(N, V\), V > 0"):
        call(logits[0])
    with pytest.raises(ValueError, match=r"token_logprobs: mask must be \(4,\), got \(3,\)"):
        call(mask=mask[:3])
    with pytest.raises(ValueError, match=r"token_logprobs: temperature must be \(4,\)"):
        call(temperature=temperature[:3])
    tensors = () if backend == "cuda" else (torch.tensor(0.0), temperature * 0)
    for bad in (0.0, -1.0, float("nan"), *tensors):
        with pytest.raises(ValueError, match="token_logprobs: temperature must be above 0"):
            call(temperature=bad)
    for wrong in (torch.ones(4).long(), torch.tensor(1), torch.ones(4).double()):
        with pytest.raises(
            TypeError, match="token_logprobs: temperature must be float32, bfloat16"
        ):
            call(temperature=wrong.to(device))
    with pytest.raises(ValueError, match="temperature must not require a gradient"):
        call(temperature=temperature.clone().requires_grad_())
    if backend == "cpu":
        with pytest.raises(IndexError, match=r"targets must be in \[0, 9\) or -100, got 9 at 1"):
            call(t=torch.tensor([0, 9, 1, 2]))
    else:
        out = call(t=torch.tensor([0, 9, 1, 2], device=device))
        assert out.logprobs[1].isnan() and out.logprobs[[0, 2, 3]].isfinite().all()
    # NaN and +inf make their row NaN, and so does a row of nothing but -inf; others stay.
    logits[0, 1], logits[1, 2], logits[2] = float("nan"), torch.inf, -torch.inf
    out = call()
    assert out.logprobs[:3].isnan().all() and out.entropy[:3].isnan().all()
    assert not out.top1[:3].any()
    assert out.logprobs[3].isfinite() and out.entropy[3].isfinite()


@pytest.mark.parametrize("entropy", [True, False])
def test_double_backward(device, dtype, entropy):
    logits, targets, mask, _ = inputs((4, 9), dtype, device)

    def loss(x):
        out = token_logprobs(x, targets, mask=mask, entropy=entropy)
        return out.logprobs.sum() + (out.entropy.sum() if entropy else 0.0)

    assert_differentiable_once("token_logprobs", loss, logits)
