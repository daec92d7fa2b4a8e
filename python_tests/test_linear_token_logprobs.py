from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close, assert_differentiable_once, assert_same_bits

from instructcore.ops import (
    linear_token_logprobs,
    linear_token_logprobs_reference,
    token_logprobs,
    token_logprobs_reference,
)

# (N, V, C) and why
SHAPES = {
    (1, 2, 8): "one row",
    (33, 259, 16): "a byte vocabulary, odd everything",
    (64, 1025, 24): "rows in several chunks of a small workspace",
    (0, 7, 8): "no rows",
}
SMALL = 1 << 17  # bytes: a chunk of few rows


def inputs(shape, dtype=torch.float32, device="cpu"):
    rows, vocab, channels = shape
    hidden = torch.randn(rows, channels).to(device, dtype)
    weight = (torch.randn(vocab, channels) / channels**0.5).to(device, dtype)
    bias = torch.randn(vocab).to(device, dtype)
    targets = torch.randint(0, vocab, (rows,), device=device)
    temperature = 0.3 + torch.rand(rows, device=device)
    return hidden, weight, bias, targets, temperature


def plain(hidden, weight, targets, *, bias=None, **options):
    """What a user of torch writes, in the tensors' own type."""
    return token_logprobs_reference(F.linear(hidden, weight, bias), targets, **options)


def gradients(f, leaves, targets, upstream, dtype=None, **options):
    hidden, weight, bias = (x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves)
    out = f(hidden, weight, targets, bias=bias, **options)
    loss = (out.logprobs * upstream[0].to(out.logprobs.dtype)).sum()
    if out.entropy is not None:
        loss = loss + (out.entropy * upstream[1].to(loss.dtype)).sum()
    return torch.autograd.grad(loss, (hidden, weight, bias))


def test_known_values():
    # The rows of weight give logits (0, h): hidden ln 3 makes p = 1/4, 3/4, ln 1 makes 1/2, 1/2.
    hidden = torch.tensor([[3.0], [1.0]]).log().requires_grad_()
    weight = torch.tensor([[0.0], [1.0]]).requires_grad_()
    out = linear_token_logprobs(hidden, weight, torch.tensor([1, 1]))
    assert out.logprobs.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 2)], rel=1e-6)
    entropy = [math.log(4) / 4 + 3 / 4 * math.log(4 / 3), math.log(2)]
    assert out.entropy.tolist() == pytest.approx(entropy, rel=1e-6)
    assert out.lse.tolist() == pytest.approx([math.log(4), math.log(2)], rel=1e-6)
    assert out.top1.tolist() == [True, False]
    # d logprob / d logits = (-1/4, 1/4) and (-1/2, 1/2).
    out.logprobs.sum().backward()
    assert hidden.grad.flatten().tolist() == pytest.approx([1 / 4, 1 / 2])
    slope = math.log(3) / 4
    assert weight.grad.flatten().tolist() == pytest.approx([-slope, slope])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("workspace", [None, SMALL], ids=["whole", "chunks"])
@pytest.mark.parametrize("kept", [1.0, 0.3], ids=["all rows", "few rows"])
def test_matches_reference(device, dtype, shape, workspace, kept, isa):
    hidden, weight, bias, targets, temperature = inputs(shape, dtype, device)
    mask = torch.rand(shape[0], device=device) < kept
    options = {"bias": bias, "temperature": temperature, "mask": mask}
    ours = linear_token_logprobs(hidden, weight, targets, max_workspace_bytes=workspace, **options)
    native = linear_token_logprobs_reference(hidden, weight, targets, **options)
    truth = linear_token_logprobs_reference(hidden.double(), weight.double(), targets, **options)
    for name in ("logprobs", "entropy", "lse"):
        # Against float32 torch for every type: the logits are not rounded to 16 bits.
        assert_close(*(getattr(x, name) for x in (ours, native, truth)), name=name)
    assert torch.equal(ours.top1, truth.top1)
    assert (ours.logprobs <= 0).all() and ours.lse[~mask].eq(0).all()


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0]], ids=str)
@pytest.mark.parametrize("workspace", [None, SMALL], ids=["whole", "chunks"])
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("kept", [1.0, 0.3], ids=["all rows", "few rows"])
def test_gradients(device, dtype, shape, workspace, entropy, kept):
    *leaves, targets, temperature = inputs(shape, dtype, device)
    mask = torch.rand(shape[0], device=device) < kept
    options = {"temperature": temperature, "mask": mask, "entropy": entropy}
    upstream = torch.randn(2, shape[0], device=device)
    ours = gradients(
        linear_token_logprobs, leaves, targets, upstream, max_workspace_bytes=workspace, **options
    )
    native = gradients(plain, leaves, targets, upstream, **options)
    truth = gradients(plain, leaves, targets, upstream, torch.float64, **options)
    for name, a, b, c in zip(("hidden", "weight", "bias"), ours, native, truth, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, c, name=name)
    assert ours[0][~mask].eq(0).all()


@pytest.mark.bug("slime#1951")
@pytest.mark.parametrize("budget", [1 << 17, 1 << 20])
def test_workspace(peak, budget):
    """The logits, 3 MB, never exist at once: not forward, and not backward."""
    hidden, weight, _, targets, _ = inputs((500, 1515, 64))
    few = 64 * len(targets)
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def forward():
        return linear_token_logprobs(hidden, weight, targets, max_workspace_bytes=budget)

    with torch.no_grad():
        held, _ = peak(forward)
    assert held <= budget + few
    held, grads = peak(lambda: torch.autograd.grad(forward().logprobs.sum(), leaves))
    assert held <= budget + few + sum(4 * g.numel() for g in grads)


@pytest.mark.parametrize("workspace", [None, SMALL], ids=["whole", "chunks"])
def test_deterministic(device, dtype, workspace, threads):
    *leaves, targets, temperature = inputs((200, 1025, 24), dtype, device)
    upstream = torch.randn(2, 200, device=device)
    options = {"temperature": temperature, "max_workspace_bytes": workspace}
    hidden, weight, bias = leaves
    native = gradients(plain, leaves, targets, upstream, temperature=temperature)
    truth = gradients(plain, leaves, targets, upstream, torch.float64, temperature=temperature)
    for n in (1, 2, 3):
        threads(n)
        first, again = (
            (
                *gradients(linear_token_logprobs, leaves, targets, upstream, **options),
                *linear_token_logprobs(hidden, weight, targets, bias=bias, **options),
            )
            for _ in range(2)
        )
        for a, b in zip(first, again, strict=True):
            assert_same_bits(a, b)
        for a, b, c in zip(first[:3], native, truth, strict=True):
            assert_close(a, b, c, name=f"{n} threads")  # torch's GEMMs round by their number


def test_identities(device):
    hidden, weight, _, targets, temperature = inputs((40, 259, 16), device=device)
    # The same as the two steps one after the other.
    out = linear_token_logprobs(hidden, weight, targets, temperature=temperature)
    two = token_logprobs(hidden @ weight.T, targets, temperature=temperature)
    for a, b in zip(out, two, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-6)
    # Masked rows may hold anything, also a wrong target and temperature.
    mask = torch.arange(40, device=device) % 2 == 1
    dirty, wrong, cold = hidden.clone(), targets.clone(), temperature.clone()
    dirty[~mask], wrong[~mask], cold[~mask] = float("nan"), 10**6, 0.0
    masked = linear_token_logprobs(dirty, weight, wrong, temperature=cold, mask=mask)
    for a, b in zip(masked, out, strict=True):
        assert torch.allclose(a[mask].float(), b[mask].float(), rtol=1e-5, atol=1e-6)
        assert a[~mask].eq(0).all()
    upstream = torch.randn(2, 40, device=device)
    leaves = (dirty, weight, torch.zeros(259, device=device))
    grads = gradients(linear_token_logprobs, leaves, wrong, upstream, temperature=cold, mask=mask)
    assert all(g.isfinite().all() for g in grads) and grads[0][~mask].eq(0).all()
    # Nothing left: zeros, gradients 0.
    none = mask & False
    grads = gradients(linear_token_logprobs, leaves, wrong, upstream, mask=none)
    assert all(g.eq(0).all() for g in grads)
    # Frozen weights: only hidden gets a gradient; under no_grad nothing does.
    h = hidden.clone().requires_grad_()
    linear_token_logprobs(h, weight, targets, entropy=False).logprobs.sum().backward()
    assert h.grad.abs().sum() > 0 and weight.grad is None
    with torch.no_grad():
        assert not linear_token_logprobs(h, weight, targets).logprobs.requires_grad


def test_opcheck_and_compile(device):
    hidden, weight, bias, targets, temperature = inputs((5, 33, 8), device=device)
    ops = torch.ops.instructcore
    forward = ops.linear_token_logprobs.default
    mask = torch.tensor([True, True, False, True, True], device=device)
    head = (hidden, weight, targets, bias, temperature, mask)
    torch.library.opcheck(forward, (*head, True, -100, 1 << 20))
    torch.library.opcheck(forward, (*head, False, -100, 1 << 20))
    _, entropy, _, _, stats = forward(*head, True, -100, 1 << 20)
    upstream = torch.randn(2, 5, device=device)
    torch.library.opcheck(
        ops.linear_token_logprobs_backward.default,
        (*upstream, *head, entropy, stats, -100, 1 << 20, [True, False, True]),
    )

    def loss(h, w, t, m):
        out = linear_token_logprobs(h, w, t, mask=m, temperature=0.8)
        return (out.logprobs + 0.1 * out.entropy).sum()

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        value = f(h, w, targets, mask)
        value.backward()
        results.append((value.detach(), h.grad, w.grad))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_rejects(device, backend):
    hidden, weight, bias, targets, temperature = inputs((4, 9, 8), device=device)
    op = "linear_token_logprobs"

    def call(h=hidden, w=weight, t=targets, **options):
        return linear_token_logprobs(h, w, t, **options)

    with pytest.raises(TypeError, match=f"{op}: hidden must be float32.*float64"):
        call(hidden.double())
    with pytest.raises(TypeError, match=f"{op}: targets must be torch.int64"):
        call(t=targets.int())
    with pytest.raises(TypeError, match=f"{op}: mask must be torch.bool"):
        call(mask=targets)
    with pytest.raises(ValueError, match=rf"{op}: hidden must be \(4, 8\), got \(4, 7\)"):
        call(hidden[:, :7])
    with pytest.raises(ValueError, match=rf"{op}: bias must be \(9,\)"):
        call(bias=bias[:5])
    with pytest.raises(ValueError, match=rf"{op}: temperature must be \(4,\)"):
        call(temperature=temperature[:3])
    with pytest.raises(TypeError, match=f"{op}: temperature must be float32, .*, got torch.int64"):
        call(temperature=targets)
    for bad in (0.0,) if backend == "cuda" else (0.0, temperature - 2):
        with pytest.raises(ValueError, match=f"{op}: temperature must be above 0"):
            call(temperature=bad)
    with pytest.raises(ValueError, match=f"{op}: max_workspace_bytes must be above 0, got 0"):
        call(max_workspace_bytes=0)
    if backend == "cpu":
        with pytest.raises(IndexError, match=rf"{op}: targets must be in \[0, 9\) or -100, got 9"):
            call(t=torch.tensor([0, 9, 1, 2]))
    else:
        out = call(t=torch.tensor([0, 9, 1, 2], device=device))
        assert out.logprobs[1].isnan() and out.logprobs[[0, 2, 3]].isfinite().all()
    # NaN in a row is shown, not hidden.
    hidden[0, 0] = float("nan")
    out = call()
    assert out.logprobs[0].isnan() and out.logprobs[1:].isfinite().all()


@pytest.mark.parametrize("entropy", [True, False])
def test_double_backward(device, dtype, entropy):
    hidden, weight, bias, targets, _ = inputs((4, 9, 8), dtype, device)

    def loss(hidden, weight, bias):
        out = linear_token_logprobs(hidden, weight, targets, bias=bias, entropy=entropy)
        return out.logprobs.sum() + (out.entropy.sum() if entropy else 0.0)

    assert_differentiable_once("linear_token_logprobs", loss, hidden, weight, bias)
