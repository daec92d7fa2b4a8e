from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close, assert_differentiable_once, assert_same_bits

from instructcore.ops import (
    cross_entropy,
    cross_entropy_reference,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

# (N, V, C) and why
SHAPES = {
    (1, 2, 8): "one row",
    (33, 259, 16): "a byte vocabulary, odd everything",
    (64, 1025, 24): "rows in several chunks of a small workspace",
    (0, 7, 8): "no rows",
}
REDUCTIONS = ("mean", "sum", "none")
SMALL = 1 << 17  # bytes: a chunk of few rows


def inputs(shape, dtype=torch.float32, device="cpu", ignored=0.05):
    rows, vocab, channels = shape
    hidden = torch.randn(rows, channels).to(device, dtype)
    weight = (torch.randn(vocab, channels) / channels**0.5).to(device, dtype)
    bias = torch.randn(vocab).to(device, dtype)
    targets = torch.randint(0, vocab, (rows,))
    targets[torch.rand(rows) < ignored] = -100
    return hidden, weight, bias, targets.to(device)


def plain(hidden, weight, targets, *, bias=None, class_weight=None, **options):
    """What a user of torch writes, in the tensors' own type."""
    logits = F.linear(hidden, weight, bias)
    return cross_entropy_reference(logits, targets, weight=class_weight, **options)


def run(f, tensors, upstream=None, dtype=None, **options):
    """(loss, gradients of hidden, weight and bias), the truth in float64 when `dtype` says so."""
    *leaves, targets = tensors
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves]
    hidden, weight, bias = leaves
    loss = f(hidden, weight, targets, bias=bias, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss, torch.autograd.grad(loss, leaves, upstream)


def test_known_values():
    # The rows of weight give logits (0, h): hidden ln 3 makes p = 1/4, 3/4, ln 1 makes 1/2, 1/2.
    hidden = torch.tensor([[3.0], [1.0]]).log().requires_grad_()
    weight = torch.tensor([[0.0], [1.0]]).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx((math.log(4) + math.log(2)) / 2, rel=1e-6)
    # Logit gradients over 2 rows: (-3, 3) / 8 and (1, -1) / 4.
    assert hidden.grad.flatten().tolist() == pytest.approx([3 / 8, -1 / 4])
    slope = 3 / 8 * math.log(3)
    assert weight.grad.flatten().tolist() == pytest.approx([-slope, slope])
    # A bias of (ln 3, 0) evens the first row out.
    bias = torch.tensor([3.0, 1.0]).log()
    loss = linear_cross_entropy(hidden[:1], weight, torch.tensor([0]), bias=bias)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("workspace", [None, SMALL], ids=["whole", "chunks"])
def test_matches_reference(device, dtype, shape, workspace, isa):
    hidden, weight, bias, targets = inputs(shape, dtype, device)
    options = {"bias": bias, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 10.0}
    for reduction in REDUCTIONS:
        options["reduction"] = reduction
        ours = linear_cross_entropy(
            hidden, weight, targets, max_workspace_bytes=workspace, **options
        )
        native = linear_cross_entropy_reference(hidden, weight, targets, **options)
        truth = linear_cross_entropy_reference(hidden.double(), weight.double(), targets, **options)
        assert ours.dtype == torch.float32
        # Against float32 torch for every type: the logits are not rounded to 16 bits.
        assert_close(ours, native, truth, name=reduction)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0]], ids=str)
@pytest.mark.parametrize("workspace", [None, SMALL], ids=["whole", "chunks"])
@pytest.mark.parametrize("ignored", [0.05, 0.6])
def test_gradients(device, dtype, shape, workspace, ignored):
    tensors = inputs(shape, dtype, device, ignored)
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "z_loss": 1e-3}
        upstream = torch.randn(shape[0] if reduction == "none" else (), device=device)
        _, ours = run(
            linear_cross_entropy, tensors, upstream, max_workspace_bytes=workspace, **options
        )
        _, native = run(plain, tensors, upstream, **options)
        _, truth = run(plain, tensors, upstream, torch.float64, **options)
        for name, a, b, c in zip(("hidden", "weight", "bias"), ours, native, truth, strict=True):
            assert a.dtype == dtype
            assert_close(a, b, c, name=f"{reduction} {name}")
        assert ours[0][tensors[3] == -100].eq(0).all()


def test_weight_gradient_is_summed_in_float32(device):
    # 4096 rows, 26 to a chunk, each adding the same 2^-9 or so: in bfloat16 the sum would stall.
    rows, vocab = 4096, 64
    hidden = torch.ones(rows, 8, device=device, dtype=torch.bfloat16)
    weight = torch.zeros(vocab, 8, device=device, dtype=torch.bfloat16).requires_grad_()
    targets = torch.zeros(rows, dtype=torch.int64, device=device)
    loss = linear_cross_entropy(
        hidden, weight, targets, reduction="sum", max_workspace_bytes=1 << 14
    )
    loss.backward()
    assert weight.grad[1].tolist() == pytest.approx([rows / vocab] * 8, rel=2**-8)


def test_mixed_types(device):
    # 16-bit hidden with float32 weights: as if hidden were float32.
    hidden, weight, bias, targets = inputs((33, 259, 16), device=device)
    hidden = hidden.bfloat16()
    ours = run(linear_cross_entropy, (hidden, weight, bias, targets))
    wide = run(linear_cross_entropy, (hidden.float(), weight, bias, targets))
    assert_same_bits(ours[0], wide[0])
    assert_same_bits(ours[1][0], wide[1][0].bfloat16())
    assert_same_bits(ours[1][1], wide[1][1])


TYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16, float32": (torch.bfloat16, torch.float32),
    "float16, float32": (torch.float16, torch.float32),
}


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize(("reduction", "ignored"), [("mean", 0), ("mean", 0.3), ("none", 0.3)])
def test_workspace(peak, types, ignored, reduction):
    hidden, weight, bias, targets = inputs((500, 515, 128), ignored=ignored)
    low, weight_type = TYPES[types]
    hidden, bias = (x.to(low).requires_grad_() for x in (hidden, bias))
    weight = weight.to(weight_type).requires_grad_()
    few = 64 * len(targets)
    for budget in (1 << 17, 1 << 20):

        def forward(budget=budget):
            return linear_cross_entropy(
                hidden, weight, targets, bias=bias, reduction=reduction, max_workspace_bytes=budget
            )

        with torch.no_grad():
            held, _ = peak(forward)
        assert held <= budget + few

        def step(forward=forward):
            return torch.autograd.grad(forward().sum(), (hidden, weight, bias))

        held, grads = peak(step)
        gradients = sum(x.numel() * x.element_size() for x in grads)
        sums = sum(4 * x.numel() for x in grads[1:] if x.dtype != torch.float32)
        assert held <= budget + gradients + sums + few


@pytest.mark.parametrize("workspace", [None, SMALL], ids=["whole", "chunks"])
def test_deterministic(device, dtype, workspace, threads):
    tensors = inputs((200, 1025, 24), dtype, device)
    _, truth = run(plain, tensors, dtype=torch.float64)
    for n in (1, 2, 3):
        threads(n)
        _, native = run(plain, tensors)
        first, again = (
            run(linear_cross_entropy, tensors, max_workspace_bytes=workspace) for _ in range(2)
        )
        assert_same_bits(first[0], again[0])
        for a, b, c, d in zip(first[1], again[1], native, truth, strict=True):
            assert_same_bits(a, b)
            assert_close(a, c, d, name=f"{n} threads")  # torch's GEMMs round by their number


def test_identities(device):
    hidden, weight, _, targets = inputs((40, 259, 16), device=device, ignored=0)
    # The same as the two ops one after the other.
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.item() == pytest.approx(cross_entropy(hidden @ weight.T, targets).item(), rel=1e-6)
    # Ignored rows may hold NaN, and leave the others as they are without them.
    for every in (40, 2):
        dirty, few = hidden.clone(), targets.clone()
        dirty[::every], few[::every] = float("nan"), -100
        kept = few != -100
        a = run(linear_cross_entropy, (dirty, weight, weight[:, 0], few))
        b = run(linear_cross_entropy, (hidden[kept], weight, weight[:, 0], targets[kept]))
        assert torch.allclose(a[0], b[0], rtol=1e-6)
        assert torch.allclose(a[1][0][kept], b[1][0], rtol=1e-5, atol=1e-8)
        assert torch.allclose(a[1][1], b[1][1], rtol=1e-5, atol=1e-8)
        assert a[1][0][~kept].eq(0).all()
    # All ignored, or no rows: 0, all gradients 0.
    none = torch.full_like(targets, -100)
    for h, t in ((dirty, none), (hidden[:0], targets[:0])):
        loss, grads = run(linear_cross_entropy, (h, weight, weight[:, 0], t))
        assert loss == 0 and all(g.eq(0).all() for g in grads)
    # Only what needs a gradient gets one; frozen weights cost nothing but their GEMM.
    h = hidden.clone().requires_grad_()
    linear_cross_entropy(h, weight, targets).backward()
    whole = run(linear_cross_entropy, (hidden, weight, torch.zeros(259), targets))
    assert torch.allclose(h.grad, whole[1][0], rtol=1e-5, atol=1e-8)
    with torch.no_grad():
        assert not linear_cross_entropy(h, weight, targets).requires_grad
    # Twice through a kept graph gives twice the gradient.
    h.grad = None
    loss = linear_cross_entropy(h, weight, targets)
    loss.backward(retain_graph=True)
    once = h.grad.clone()
    loss.backward()
    assert_same_bits(h.grad, 2 * once)


def test_opcheck_and_compile(device):
    hidden, weight, bias, targets = inputs((5, 33, 8), device=device)
    op = torch.ops.instructcore.linear_cross_entropy.default
    class_weight, upstream = torch.rand(33, device=device), torch.randn(5, device=device)
    settings = (-100, 0.1, 1e-3, 5.0)
    arguments = (hidden, weight, targets, bias, class_weight)
    torch.library.opcheck(op, (*arguments, None, *settings, 2, 1 << 20, [True, True, True]))
    torch.library.opcheck(op, (*arguments, upstream, *settings, 0, 1 << 20, [True, False, True]))
    half = (hidden.bfloat16(), weight.bfloat16(), targets, None, None, None)
    torch.library.opcheck(op, (*half, *settings, 1, 1 << 20, [False, True, False]))
    for reduction in ("mean", "none"):

        def loss(hidden, weight, targets, bias=None, reduction=reduction):
            return 2 * linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()

        def leaves():
            return [x.clone().requires_grad_() for x in (hidden, weight)]

        results = []
        for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            h, w = leaves()
            value = f(h, w, targets)
            value.backward()
            results.append((value.detach(), h.grad, w.grad))
        for a, b in zip(*results, strict=True):
            assert_same_bits(a, b)


def test_rejects(device, backend):
    hidden, weight, bias, targets = inputs((4, 9, 8), device=device, ignored=0)
    op = "linear_cross_entropy"

    def call(h=hidden, w=weight, t=targets, **options):
        return linear_cross_entropy(h, w, t, **options)

    with pytest.raises(TypeError, match=f"{op}: hidden must be float32.*float64"):
        call(hidden.double())
    with pytest.raises(TypeError, match=f"{op}: weight must be torch.bfloat16 or float32"):
        call(hidden.bfloat16(), weight.half())
    with pytest.raises(TypeError, match=f"{op}: targets must be torch.int64"):
        call(t=targets.int())
    with pytest.raises(ValueError, match=rf"{op}: hidden must be \(4, 8\), got \(4, 7\)"):
        call(hidden[:, :7])
    with pytest.raises(ValueError, match=rf"{op}: hidden must be \(N, C\) and weight \(V, C\)"):
        call(hidden[0])
    with pytest.raises(ValueError, match=rf"{op}: targets must be \(4,\)"):
        call(t=targets[:3])
    with pytest.raises(ValueError, match=rf"{op}: bias must be \(9,\)"):
        call(bias=bias[:5])
    with pytest.raises(TypeError, match=f"{op}: class_weight must be float32, .*, got torch.int64"):
        call(class_weight=targets)
    with pytest.raises(ValueError, match=rf"{op}: class_weight must be \(9,\)"):
        call(class_weight=bias[:5])
    with pytest.raises(ValueError, match=f"{op}: reduction must be"):
        call(reduction="max")
    with pytest.raises(ValueError, match=f"{op}: max_workspace_bytes must be above 0, got 0"):
        call(max_workspace_bytes=0)
    with pytest.raises(ValueError, match=f"{op}: weight must be on"):
        call(w=weight.to("meta"))
    if backend == "cpu":
        with pytest.raises(IndexError, match=rf"{op}: targets must be in \[0, 9\) or -100, got 9"):
            call(t=torch.tensor([0, 9, 1, 2]))
    else:
        loss = call(t=torch.tensor([0, 9, 1, 2], device=device), reduction="none")
        assert loss[1].isnan() and loss[[0, 2, 3]].isfinite().all()
    # NaN in a row is shown, not hidden.
    hidden[0, 0] = float("nan")
    loss = call(reduction="none")
    assert loss[0].isnan() and loss[1:].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward(device, dtype, reduction):
    hidden, weight, bias, targets = inputs((4, 9, 8), dtype, device)

    def loss(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction).sum()

    assert_differentiable_once("linear_cross_entropy", loss, hidden, weight, bias)
