from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close, assert_differentiable_once, assert_same_bits

from instructcore import _C
from instructcore.ops import cross_entropy, cross_entropy_reference

# (N, V) and why
SHAPES = {
    (1, 1): "a single class: loss 0",
    (64, 2): "two classes, and rows enough to meet the worst of rounding",
    (5, 97): "odd, no whole vector of 16 at the end",
    (97, 259): "a byte vocabulary; more rows than a piece holds",
    (4, 2049): "one logit past a block",
    (3, 50257): "GPT-2's vocabulary: many blocks, rows not aligned",
    (0, 7): "no rows",
}

# Settings, as plain as F.cross_entropy knows them and beyond.
SETTINGS = {
    "plain": {},
    "smoothed, weighted": {"label_smoothing": 0.1, "weight": True},
    "capped, z-loss": {"softcap": 5.0, "z_loss": 1e-2},
    "everything": {"softcap": 5.0, "z_loss": 1e-2, "label_smoothing": 0.3, "weight": True},
}


def inputs(shape, dtype=torch.float32, device="cpu", ignored=0.2):
    rows, vocab = shape
    logits = (3 * torch.randn(rows, vocab)).to(device, dtype)
    targets = torch.randint(0, vocab, (rows,))
    targets[torch.rand(rows) < ignored] = -100
    return logits, targets.to(device)


def options_of(name, vocab, device="cpu"):
    options = dict(SETTINGS[name])
    if options.pop("weight", False):
        weight = torch.rand(vocab, device=device)
        weight[0] = 0.0
        options["weight"] = weight
    return options


def gradient(f, logits, targets, upstream=None, dtype=None, **options):
    """(loss, gradient), the truth in float64 when `dtype` says so."""
    x = logits.detach().to(dtype or logits.dtype).requires_grad_()
    loss = f(x, targets, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss, torch.autograd.grad(loss, x, upstream)[0]


def test_known_values():
    # Logits ln 1, ln 2, ln 5: p = 1/8, 2/8, 5/8. Losses: ln 4 and ln (8/5); the third is ignored.
    row = torch.tensor([1.0, 2.0, 5.0]).log()
    logits, targets = row.repeat(3, 1), torch.tensor([1, 2, -100])
    loss, grad = gradient(cross_entropy, logits, targets, reduction="sum")
    assert loss.item() == pytest.approx(math.log(4) + math.log(8 / 5), rel=1e-6)
    expected = torch.tensor([[1, -6, 5], [1, 2, -3], [0, 0, 0]]) / 8.0
    assert torch.allclose(grad, expected, atol=1e-7)
    loss, grad = gradient(cross_entropy, logits, targets)
    assert loss.item() == pytest.approx((math.log(4) + math.log(8 / 5)) / 2, rel=1e-6)
    assert torch.allclose(grad, expected / 2, atol=1e-7)
    # lse = ln 8; z-loss adds z (ln 8)^2 to each row, whose slope along p is 2 z ln 8.
    loss, grad = gradient(cross_entropy, logits[:1], targets[:1], z_loss=0.1)
    assert loss.item() == pytest.approx(math.log(4) + 0.1 * math.log(8) ** 2, rel=1e-6)
    z = 0.2 * math.log(8)
    assert torch.allclose(grad, (expected + torch.tensor([1, 2, 5]) / 8 * z)[:1], atol=1e-7)
    # The mean over weights 4 and 1: (4 ln 4 + 1 ln 8/5) / 5.
    loss = cross_entropy(logits, targets, weight=torch.tensor([9.0, 4.0, 1.0]))
    assert loss.item() == pytest.approx((4 * math.log(4) + math.log(8 / 5)) / 5, rel=1e-6)
    # Capped at 1, logits of 0 and 1000 are 0 and 1.
    loss = cross_entropy(torch.tensor([[0.0, 1000.0]]), torch.tensor([1]), softcap=1.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_matches_reference(device, dtype, shape, setting, isa):
    logits, targets = inputs(shape, dtype, device)
    options = options_of(setting, shape[1], device)
    for reduction in ("none", "mean"):
        ours = cross_entropy(logits, targets, reduction=reduction, **options)
        native = cross_entropy_reference(logits, targets, reduction=reduction, **options)
        truth = cross_entropy_reference(logits.double(), targets, reduction=reduction, **options)
        assert ours.dtype == torch.float32
        assert_close(ours, native, truth, name=reduction)


@pytest.mark.parametrize("layout", ["padded rows", "every other row", "one row for all", "columns"])
def test_strides(device, dtype, layout):
    logits, targets = inputs((6, 131), dtype, device, ignored=0)
    if layout == "padded rows":
        view = F.pad(logits, (3, 10), value=float("nan"))[:, 3:-10]
    elif layout == "every other row":
        view = logits.repeat_interleave(2, 0)[::2]
    elif layout == "one row for all":
        logits = logits[:1].expand(6, -1).contiguous()
        view = logits[:1].expand(6, -1)
    else:
        view = logits.T.contiguous().T
    for reduction in ("none", "sum"):
        upstream = torch.randn(6 if reduction == "none" else (), device=device)
        a = gradient(cross_entropy, view, targets, upstream, reduction=reduction)
        b = gradient(cross_entropy, logits, targets, upstream, reduction=reduction)
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)
    # The gradient of a sum comes back expanded, with stride 0.
    x = logits.clone().requires_grad_()
    cross_entropy(x, targets, reduction="none").sum().backward()
    assert_same_bits(x.grad, gradient(cross_entropy, logits, targets, reduction="none")[1])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(33, 259), (3, 5003)], ids=str)
def test_gradients(device, dtype, shape, setting, reduction, isa):
    logits, targets = inputs(shape, dtype, device)
    before = logits.clone()
    options = {"reduction": reduction, **options_of(setting, shape[1], device)}
    upstream = torch.randn(shape[0] if reduction == "none" else (), device=device)
    _, ours = gradient(cross_entropy, logits, targets, upstream, **options)
    _, native = gradient(cross_entropy_reference, logits, targets, upstream, **options)
    _, truth = gradient(
        cross_entropy_reference, logits, targets, upstream, torch.float64, **options
    )
    assert ours.dtype == dtype
    assert_close(ours, native, truth)
    assert ours[targets == -100].eq(0).all()
    assert_same_bits(logits, before, "the logits")


def test_gradient_at_a_certain_target(device, dtype):
    # 1 - p(target) = 3e-3, 1.4e-4 and 7e-6 keep their digits, though in 16 bits p itself is 1.
    logits = torch.zeros(3, 4, device=device, dtype=dtype)
    logits[:, 0] = torch.tensor([7.0, 10.0, 13.0])
    targets = torch.zeros(3, dtype=torch.int64, device=device)
    _, ours = gradient(cross_entropy, logits, targets, reduction="sum")
    _, truth = gradient(
        cross_entropy_reference, logits, targets, dtype=torch.float64, reduction="sum"
    )
    assert torch.allclose(ours.double(), truth, rtol=0.01, atol=0)


def test_float16_gradient_survives_the_loss_scale(device):
    # Each entry is about 1 / (N V) = 4e-8, below float16's least number, until the scale of 2^16.
    logits = torch.zeros(512, 50000, device=device, dtype=torch.float16).requires_grad_()
    targets = torch.zeros(512, dtype=torch.int64, device=device)
    (65536 * cross_entropy(logits, targets)).backward()
    assert logits.grad[0, 1].item() == pytest.approx(65536 / 512 / 50000, rel=1e-3)


def test_deterministic(device, dtype, threads):
    logits, targets = inputs((300, 1025), dtype, device)
    for reduction in ("mean", "none"):
        results = []
        for n in (1, 2, 3):
            threads(n)
            results.append(gradient(cross_entropy, logits, targets, reduction=reduction))
        for loss, grad in results[1:]:
            assert_same_bits(loss, results[0][0])
            assert_same_bits(grad, results[0][1])
    # A row's bits are its own: not its neighbours', nor those of the way the gradient was formed.
    alone = gradient(cross_entropy, logits[7:8], targets[7:8].abs(), reduction="sum")
    whole = gradient(cross_entropy, logits, targets.abs().clamp(max=1024), reduction="none")
    if targets[7] >= 0:
        assert_same_bits(alone[0], whole[0][7])
        assert_same_bits(alone[1][0], whole[1][7])


def test_same_bits_on_every_level_with_fma(dtype):
    logits, targets = inputs((9, 5003), dtype)
    best, results = _C.build_info()["isa"], []
    for level in _C.isa_levels()[1:]:
        _C.set_isa(level)
        results.append(
            gradient(cross_entropy, logits, targets, softcap=9.0, label_smoothing=0.1, z_loss=1e-3)
        )
    _C.set_isa(best)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)


def test_identities(device):
    logits, targets = inputs((20, 777), device=device, ignored=0)
    # A row of the gradient sums to 0; a constant added to the logits changes nothing.
    loss, grad = gradient(cross_entropy, logits, targets)
    assert grad.double().sum(1).abs().max() < 1e-7
    assert cross_entropy(logits + 100, targets).item() == pytest.approx(loss.item(), rel=1e-5)
    # F.cross_entropy where it can do the same.
    weight = torch.rand(777, device=device)
    theirs = F.cross_entropy(logits, targets, weight, label_smoothing=0.2)
    ours = cross_entropy(logits, targets, weight=weight, label_smoothing=0.2)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    # All targets ignored, or no rows: 0, with gradient 0, even behind NaN.
    for x, t in ((logits * float("nan"), targets * 0 - 100), (logits[:0], targets[:0])):
        loss, grad = gradient(cross_entropy, x, t)
        assert loss == 0 and grad.eq(0).all() and grad.shape == x.shape
    # Any index may be the ignored one.
    few = targets.clone()
    few[::3] = 5
    kept = few != 5
    assert_same_bits(
        cross_entropy(logits, few, ignore_index=5), cross_entropy(logits[kept], few[kept])
    )
    # A masked vocabulary is as good as a smaller one, wherever the mask lies: also a whole block.
    wide = torch.full((20, 5000), -torch.inf, device=device)
    wide[:, 3000:3777] = logits
    a = gradient(cross_entropy, wide, targets + 3000)
    b = gradient(cross_entropy, logits, targets)
    assert torch.allclose(a[0], b[0], rtol=1e-6)
    assert torch.allclose(a[1][:, 3000:3777], b[1], rtol=1e-5, atol=1e-9)
    assert a[1][:, :3000].eq(0).all() and a[1][:, 3777:].eq(0).all()
    # Large logits neither overflow nor vanish.
    big = gradient(cross_entropy, torch.tensor([[3e38, -3e38, 3e38]]), torch.tensor([1]))
    assert big[0] == torch.inf and torch.allclose(big[1], torch.tensor([[0.5, -1.0, 0.5]]))


def test_opcheck_and_compile(device):
    logits, targets = inputs((5, 33), device=device)
    weight = torch.rand(33, device=device)
    ops = torch.ops.instructcore
    forward, backward = ops.cross_entropy.default, ops.cross_entropy_backward.default
    settings = (-100, 0.1, 1e-3, 5.0, 2)
    torch.library.opcheck(forward, (logits, targets, weight, *settings, True))
    torch.library.opcheck(forward, (logits, targets, None, *settings, False))
    _, stats, total, _ = forward(logits, targets, weight, *settings, False)
    upstream = torch.ones((), device=device)
    torch.library.opcheck(backward, (upstream, logits, targets, weight, stats, total, *settings))

    for reduction, backend in (("mean", "inductor"), ("none", "aot_eager")):

        def loss(x, t, reduction=reduction):
            return (2 * cross_entropy(2 * x, t, z_loss=1e-3, reduction=reduction)).sum()

        results = []
        for f in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
            x = logits.clone().requires_grad_()
            value = f(x, targets)
            value.backward()
            results.append((value.detach(), x.grad))
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def test_rejects(device, backend):
    logits, targets = inputs((4, 9), device=device, ignored=0)

    def call(x=logits, t=targets, **options):
        return cross_entropy(x, t, **options)

    with pytest.raises(TypeError, match="cross_entropy: logits must be float32.*float64"):
        call(logits.double())
    with pytest.raises(TypeError, match="cross_entropy: targets must be torch.int64"):
        call(t=targets.int())
    with pytest.raises(ValueError, match=r"cross_entropy: logits must be \(N, V\), V > 0"):
        call(logits[0])
    with pytest.raises(ValueError, match=r"cross_entropy: targets must be \(4,\), got \(3,\)"):
        call(t=targets[:3])
    for wrong in (torch.int64, torch.bool, torch.float64):
        with pytest.raises(TypeError, match="cross_entropy: weight must be float32, bfloat16 or"):
            call(weight=torch.ones(9, device=device, dtype=wrong))
    with pytest.raises(ValueError, match=r"cross_entropy: weight must be \(9,\)"):
        call(weight=torch.ones(8, device=device))
    with pytest.raises(ValueError, match='reduction must be "mean", "sum" or "none", got \'max\''):
        call(reduction="max")
    for name in ("label_smoothing", "z_loss", "softcap"):
        with pytest.raises(ValueError, match=f"cross_entropy: {name} must be .*, got -1"):
            call(**{name: -1.0})
    with pytest.raises(ValueError, match="targets must be on"):
        call(t=targets.to("meta"))
    if backend == "cpu":
        for bad in (9, -1):
            with pytest.raises(
                IndexError, match=rf"targets must be in \[0, 9\) or -100, got {bad}"
            ):
                call(t=torch.tensor([0, 1, bad, 2]))
    # NaN and +inf make their row NaN, and so does a row of nothing but -inf; others stay.
    logits[0, 1], logits[1, 2], logits[2] = float("nan"), torch.inf, -torch.inf
    loss, grad = gradient(cross_entropy, logits, targets, reduction="none")
    assert loss[:3].isnan().all() and loss[3].isfinite()
    assert grad[:3].isnan().any(1).all() and grad[3].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward(device, dtype, reduction):
    logits, targets = inputs((4, 9), dtype, device)
    assert_differentiable_once(
        "cross_entropy", lambda x: cross_entropy(x, targets, reduction=reduction).sum(), logits
    )
    # The loss may be changed in place before its backward.
    x = logits.clone().requires_grad_()
    loss = cross_entropy(x, targets, reduction=reduction)
    loss /= 2
    loss.sum().backward()
    _, whole = gradient(cross_entropy, logits, targets, reduction=reduction)
    assert torch.allclose(2 * x.grad.float(), whole.float(), rtol=2**-7, atol=2**-23)
