from __future__ import annotations

import math

import pytest
import torch
from tolerance import assert_close, assert_differentiable_once, assert_same_bits

from instructcore.ops import ppo_loss, ppo_loss_reference

# Powers of two where a bound recurs in every token: 0.8 rounded to float32 would be a common error.
EVERYTHING = {
    "clip_range": 0.25,
    "clip_range_high": 0.375,
    "dual_clip": 1.5,
    "value_clip_range": 0.25,
    "value_coef": 0.5,
    "entropy_coef": 0.01,
    "kl_coef": 0.05,
}

# (B, T) and why
SHAPES = {
    (1, 1): "one token",
    (5, 37): "odd, no multiple of 16",
    (3, 1025): "rows past a power of two",
    (1, 5000): "one row of several blocks",
    (3, 0): "rows without tokens",
    (0, 4): "no rows",
}
DIFFERENTIABLE = ("logprobs", "values", "entropy")


def inputs(shape, dtype=torch.float32, device="cpu"):
    """Ratios well away from the kinks, where a rounding would choose another branch."""
    generator = torch.Generator().manual_seed(1)

    def random(low, high):
        return torch.rand(shape, generator=generator) * (high - low) + low

    old = random(-4, -1)
    step = random(0.03, 0.15) + (torch.rand(shape, generator=generator) > 0.5) * random(0.3, 0.5)
    sign = torch.where(torch.rand(shape, generator=generator) > 0.5, 1.0, -1.0)
    values = random(-2, 2)
    tensors = {
        "logprobs": old + sign * step,
        "old_logprobs": old,
        "advantages": torch.randn(shape, generator=generator),
        "mask": torch.rand(shape, generator=generator) > 0.3,
        "values": values,
        "old_values": values - sign * (0.1 + 0.5 * (random(0, 1) > 0.5)),
        "returns": random(-2, 2),
        "entropy": random(0, 5),
        "ref_logprobs": old + random(-0.5, 0.5),
        "weights": random(0.5, 1.5),
    }
    return {k: v.to(device) if k == "mask" else v.to(device, dtype) for k, v in tensors.items()}


def run(f, tensors, dtype=None, **options):
    """(loss, sums, gradients) with leaves of `dtype`."""
    leaves = {k: v if k == "mask" else v.detach().to(dtype or v.dtype) for k, v in tensors.items()}
    for name in DIFFERENTIABLE:
        if name in leaves:
            leaves[name] = leaves[name].clone().requires_grad_()
    loss, stats = f(**leaves, **options)
    loss.backward()
    return loss, stats.sums, {k: leaves[k].grad for k in DIFFERENTIABLE if k in leaves}


@pytest.mark.checklist(9, 20, 21)
def test_known_values():
    # ratios 1.5 and 0.5, clip 0.2, A = 1 and -1:
    # token 0: max(-1.5, -1.2) = -1.2 (clipped); token 1: max(0.5, 0.8) = 0.8 (clipped)
    # token 2 is masked. loss = (-1.2 + 0.8) / 2 = -0.2
    logprobs = torch.tensor([[math.log(1.5), math.log(0.5), 9.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    advantages = torch.tensor([[1.0, -1.0, 1.0]])
    loss, stats = ppo_loss(logprobs, torch.zeros(1, 3), advantages, mask)
    assert loss.item() == pytest.approx(-0.2, abs=1e-6)
    assert stats.total("count") == 2 and stats.total("clipped") == 2
    assert stats.means()["ratio"] == pytest.approx(1.0)
    k2 = (math.log(1.5) ** 2 + math.log(0.5) ** 2) / 4  # half the mean of the squares
    assert stats.means()["approx_kl"] == pytest.approx(k2)
    loss.backward()
    assert logprobs.grad.tolist() == [[0, 0, 0]]  # clipped tokens push no further
    # The other way round the unclipped branch is the worse one and keeps its gradient, -rho A / 2.
    logprobs.grad = None
    ppo_loss(logprobs, torch.zeros(1, 3), -advantages, mask)[0].backward()
    assert logprobs.grad[0].tolist() == pytest.approx([0.75, -0.25, 0])
    # Values: v = 2, old 1, R = 0, clip 0.2: max(2^2, 1.2^2) / 2 = 2, times 0.1; gradient 0.1 * 2.
    values = torch.tensor([2.0], requires_grad=True)
    zero, yes = torch.zeros(1), torch.ones(1, dtype=torch.bool)
    loss, _ = ppo_loss(zero, zero, zero, yes, values=values, old_values=torch.ones(1), returns=zero)
    loss.backward()
    assert loss.item() == pytest.approx(0.2) and values.grad.item() == pytest.approx(0.2)
    # Dual clip 3: rho = 5, A = -1 costs at most 3.
    five = torch.tensor([math.log(5.0)])
    assert ppo_loss(five, zero, -torch.ones(1), yes, dual_clip=3.0)[0] == 3.0
    # k3 of d = ln 2: 2 - 1 - ln 2.
    loss, _ = ppo_loss(zero, zero, zero, yes, ref_logprobs=torch.tensor([math.log(2.0)]), kl_coef=1)
    assert loss.item() == pytest.approx(1 - math.log(2.0), abs=1e-6)


@pytest.mark.checklist(23)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_matches_reference(device, dtype, shape, aggregate, isa):
    tensors = inputs(shape, dtype, device)
    options = {"aggregate": aggregate, "normalizer": 7.0 if aggregate == "constant" else None}
    ours = run(ppo_loss, tensors, **options, **EVERYTHING)
    native = run(ppo_loss_reference, tensors, **options, **EVERYTHING)
    truth = run(ppo_loss_reference, tensors, torch.float64, **options, **EVERYTHING)
    assert_close(ours[0], native[0].float(), truth[0], dtype, "loss")
    assert_close(ours[1], native[1].float(), truth[1], dtype, "sums")


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
@pytest.mark.parametrize("options", [{}, EVERYTHING, {"value_clip_range": None}], ids=str)
def test_gradients(device, dtype, aggregate, options):
    tensors = inputs((5, 37), dtype, device)
    options = {**options, "aggregate": aggregate}
    if aggregate == "constant":
        options["normalizer"] = torch.tensor(11.0, device=device)
    ours = run(ppo_loss, tensors, **options)[2]
    native = run(ppo_loss_reference, tensors, **options)[2]
    truth = run(ppo_loss_reference, tensors, torch.float64, **options)[2]
    for name in DIFFERENTIABLE:
        assert ours[name].dtype == dtype
        assert_close(ours[name], native[name], truth[name], name=name)


def test_packed_equals_padded(device):
    lengths = [5, 1, 33, 12]
    tensors = inputs((4, 33), device=device)
    inside = torch.arange(33, device=device) < torch.tensor(lengths, device=device)[:, None]
    tensors["mask"] &= inside
    cu = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    packed = {k: v[inside] for k, v in tensors.items()}
    for aggregate in ("token", "sequence"):
        a = run(ppo_loss, tensors, aggregate=aggregate, **EVERYTHING)
        b = run(ppo_loss, packed, aggregate=aggregate, cu_seqlens=cu, **EVERYTHING)
        assert torch.allclose(a[0], b[0], rtol=1e-6)
        assert torch.allclose(a[1], b[1], rtol=1e-5)
        for name in DIFFERENTIABLE:
            assert torch.allclose(a[2][name][inside], b[2][name], rtol=1e-6, atol=1e-9)


@pytest.mark.checklist(22)
@pytest.mark.bug("TRL 1.14")
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_ranks_add_up(device, aggregate, ranks):
    """With the global normaliser, losses, statistics and gradients of ranks sum to the whole's.

    Of one parameter that all share, whatever share of the tokens each rank has.
    """
    tensors = inputs((8, 50), device=device)
    tensors["mask"] &= torch.rand(8, 1, device=device) > torch.arange(8, device=device)[:, None] / 9
    tensors["mask"][-1] = False  # a rank, or part of one, without tokens
    everyone = {
        "token": tensors["mask"].sum(),
        "sequence": tensors["mask"].any(1).sum(),
        "constant": torch.tensor(8.0 * 50, device=device),
    }[aggregate]
    options = {**EVERYTHING, "aggregate": aggregate, "normalizer": everyone}

    def of(part):
        shared = torch.zeros(3, device=device, requires_grad=True)
        local = {k: v[part] for k, v in tensors.items()}
        moved = {k: local[k] + shared[i] for i, k in enumerate(DIFFERENTIABLE)}
        loss, stats = ppo_loss(**local | moved, **options)
        loss.backward()
        return loss.detach(), stats.sums, shared.grad

    size = 8 // ranks
    parts = [of(slice(i * size, (i + 1) * size)) for i in range(ranks)]
    for mine, whole in zip(map(sum, zip(*parts, strict=True)), of(slice(0, 8)), strict=True):
        assert (mine - whole).norm() <= 1e-5 * whole.norm()


@pytest.mark.parametrize("ends", [[1, 4], [0, 2, 2, 5], [6, 6], [3], [0]], ids=str)
def test_packed_tokens_outside_every_row_count_nowhere(device, ends, dirty_memory):
    cu = torch.tensor(ends, dtype=torch.int32, device=device)
    tensors = {k: v[0] for k, v in inputs((1, 6), device=device).items()}
    tensors["mask"] = torch.ones_like(tensors["mask"])
    options = {"aggregate": "sequence", "cu_seqlens": cu, **EVERYTHING}
    ours = run(ppo_loss, tensors, **options)
    native = run(ppo_loss_reference, tensors, **options)
    truth = run(ppo_loss_reference, tensors, torch.float64, **options)
    assert_close(ours[0], native[0], truth[0], name="loss")
    assert_close(ours[1], native[1], truth[1], name="sums")
    assert ours[1][0] == ends[-1] - ends[0]
    outside = torch.ones(6, dtype=torch.bool, device=device)
    outside[ends[0] : ends[-1]] = False
    for name in DIFFERENTIABLE:
        assert_close(ours[2][name], native[2][name], truth[2][name], name=name)
        assert ours[2][name][outside].eq(0).all()
    # Whatever is there.
    dirty = {k: v if k == "mask" else v.masked_fill(outside, math.nan) for k, v in tensors.items()}
    again = run(ppo_loss, dirty, **options)
    assert_same_bits(again[0], ours[0])
    for name in DIFFERENTIABLE:
        assert_same_bits(again[2][name], ours[2][name])


def test_tokens_of_no_row(device):
    tensors = {k: v[0] for k, v in inputs((1, 60), device=device).items()}
    cu = torch.tensor([7, 20, 20, 55], dtype=torch.int32, device=device)
    inside = {k: v[7:55] for k, v in tensors.items()}
    options = {"aggregate": "sequence", **EVERYTHING}
    loss, sums, gradients = run(ppo_loss, tensors, cu_seqlens=cu, **options)
    alone = run(ppo_loss, inside, cu_seqlens=cu - 7, **options)
    assert torch.allclose(loss, alone[0], rtol=1e-6) and torch.allclose(sums, alone[1], rtol=1e-5)
    for name in DIFFERENTIABLE:
        assert_same_bits(gradients[name][7:55], alone[2][name])
        assert gradients[name][:7].eq(0).all() and gradients[name][55:].eq(0).all()


def test_deterministic(device, threads):
    tensors = inputs((64, 300), device=device)
    first = run(ppo_loss, tensors, **EVERYTHING)
    for n in (1, 2, 3):
        threads(n)
        again = run(ppo_loss, tensors, **EVERYTHING)
        assert_same_bits(first[0], again[0])
        assert_same_bits(first[1], again[1])
        for name in DIFFERENTIABLE:
            assert_same_bits(first[2][name], again[2][name])


@pytest.mark.checklist(19)
def test_identities(device):
    tensors = inputs((8, 50), device=device)
    mask = tensors["mask"]
    # The same policy: ratio 1, nothing clipped, KL 0, and the loss is minus the mean advantage.
    same = {**tensors, "logprobs": tensors["old_logprobs"], "ref_logprobs": tensors["old_logprobs"]}
    same = {k: same[k] for k in ("logprobs", "old_logprobs", "advantages", "mask", "ref_logprobs")}
    loss, stats = ppo_loss(**same, kl_coef=1.0)
    means = stats.means()
    assert means["ratio"] == 1 and means["clipped"] == 0 and means["kl"] == 0
    assert means["approx_kl"] == 0
    assert loss.item() == pytest.approx(-tensors["advantages"][mask].mean().item(), abs=1e-6)
    # Two halves with the whole's normaliser add up to the whole.
    whole = run(ppo_loss, tensors, **EVERYTHING)
    n = float(mask.sum())
    halves = [
        run(ppo_loss, {k: v[part] for k, v in tensors.items()}, normalizer=n, **EVERYTHING)
        for part in (slice(0, 3), slice(3, 8))
    ]
    assert torch.allclose(halves[0][0] + halves[1][0], whole[0], rtol=1e-6)
    assert torch.allclose(halves[0][1] + halves[1][1], whole[1], rtol=1e-5)
    for name in DIFFERENTIABLE:
        both = torch.cat([h[2][name] for h in halves])
        assert torch.allclose(both, whole[2][name], rtol=1e-5, atol=1e-9)
    # Nothing unmasked: loss and gradients 0, no NaN, whatever is there.
    empty = {k: v if k == "mask" else v * float("nan") for k, v in tensors.items()}
    empty["mask"] = mask & False
    for aggregate in ("token", "sequence"):
        loss, _, gradients = run(ppo_loss, empty, aggregate=aggregate, **EVERYTHING)
        assert loss == 0 and all(g.eq(0).all() for g in gradients.values())
    # Masked tokens may hold anything.
    dirty = {
        k: v if k == "mask" else torch.where(mask, v, float("nan")) for k, v in tensors.items()
    }
    again = run(ppo_loss, dirty, **EVERYTHING)
    assert_same_bits(again[0], whole[0])
    for name in DIFFERENTIABLE:
        assert_same_bits(again[2][name], whole[2][name])
    # A ratio beyond e^20 is bounded and pushes no further.
    far = torch.tensor([30.0], device=device, requires_grad=True)
    one = torch.ones(1, device=device)
    loss, _ = ppo_loss(far, 0 * one, -one, one.bool())
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(20.0), rel=1e-5) and far.grad.item() == 0


@pytest.mark.big
def test_opcheck_and_compile(device):
    tensors = inputs((3, 7), device=device)
    order = ("values", "old_values", "returns", "entropy", "ref_logprobs", "weights")
    first = [tensors[k] for k in ("logprobs", "old_logprobs", "advantages", "mask")]
    rest = [tensors[k] for k in order]
    settings = (False, 0.8, 1.2, -1.0, 0.2, 0.1, 0.0, 0.0)
    op = torch.ops.instructcore.ppo_loss.default
    for gradients in (True, False):
        torch.library.opcheck(op, (*first, *rest, None, None, *settings, gradients))

    def step(logprobs):
        loss, stats = ppo_loss(2 * logprobs, *first[1:])
        return loss, stats.sums

    leaves = [tensors["logprobs"].clone().requires_grad_() for _ in range(2)]
    eager, compiled = step(leaves[0]), torch.compile(step, fullgraph=True)(leaves[1])
    for a, b in zip(eager, compiled, strict=True):
        assert_same_bits(a, b)
    eager[0].backward()
    compiled[0].backward()
    assert_same_bits(leaves[0].grad, leaves[1].grad)


def test_rejects():
    tensors = inputs((2, 3))
    base = {k: tensors[k] for k in ("logprobs", "old_logprobs", "advantages", "mask")}
    with pytest.raises(TypeError, match="ppo_loss: advantages must be float32"):
        ppo_loss(**{**base, "advantages": base["advantages"].double()})
    with pytest.raises(ValueError, match=r"ppo_loss: mask must be \(2, 3\), got \(2, 2\)"):
        ppo_loss(**{**base, "mask": base["mask"][:, :2]})
    with pytest.raises(ValueError, match="values need returns"):
        ppo_loss(**base, values=tensors["values"])
    with pytest.raises(ValueError, match="value_clip_range needs old_values"):
        ppo_loss(**base, values=tensors["values"], returns=tensors["returns"])
    with pytest.raises(ValueError, match="aggregate must be \"token\", .* got 'mean'"):
        ppo_loss(**base, aggregate="mean")
    with pytest.raises(ValueError, match="needs a normalizer"):
        ppo_loss(**base, aggregate="constant")
    with pytest.raises(ValueError, match="packed .* needs cu_seqlens"):
        ppo_loss(**{k: v[0] for k, v in base.items()}, aggregate="sequence")
    with pytest.raises(RuntimeError, match="ppo_loss: cu_seqlens must"):
        cu = torch.tensor([0, 9], dtype=torch.int32)
        ppo_loss(**{k: v[0] for k, v in base.items()}, aggregate="sequence", cu_seqlens=cu)
    with pytest.raises(ValueError, match=r"ppo_loss: cu_seqlens must be \(B \+ 1,\), got \(0,\)"):
        cu = torch.zeros(0, dtype=torch.int32)
        ppo_loss(**{k: v[0] for k, v in base.items()}, aggregate="sequence", cu_seqlens=cu)
    for name, least, values in (
        ("clip_range", 0, (0.0, -0.2, math.nan)),
        ("clip_range_high", 0, (0.0, -0.2)),
        ("value_clip_range", 0, (0.0, -1.0)),
        ("dual_clip", 1, (1.0, 0.5, -3.0)),
    ):
        for bad in values:
            with pytest.raises(
                ValueError, match=f"ppo_loss: {name} must be above {least}, got {bad}"
            ):
                ppo_loss(**base, **{name: bad})
    nan = {**base, "logprobs": base["logprobs"] * float("nan")}
    assert ppo_loss(**nan)[0].isnan()  # an unmasked NaN is shown


def test_double_backward(device):
    tensors = inputs((2, 3), device=device)

    def loss(*leaves):
        return ppo_loss(**{**tensors, **dict(zip(DIFFERENTIABLE, leaves, strict=True))})[0]

    assert_differentiable_once("ppo_loss", loss, *(tensors[name] for name in DIFFERENTIABLE))
