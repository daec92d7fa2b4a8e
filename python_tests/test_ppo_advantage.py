from __future__ import annotations

import math

import pytest
import torch
from tolerance import assert_close, assert_same_bits

from instructcore.ops import (
    gae,
    ppo_advantage,
    ppo_advantage_reference,
    whiten_advantages,
    whiten_advantages_reference,
)

SETTINGS = {"kl_coef": 0.05, "gamma": 0.99, "lambda_": 0.95}

# (B, T) and why
SHAPES = {
    (1, 1): "a single token: nothing to whiten",
    (5, 37): "odd, no multiple of 16",
    (130, 20): "the shape of a small rollout",
    (2, 1025): "long rows",
    (3, 0): "rows without steps",
    (0, 4): "no rows",
}


def inputs(shape, dtype=torch.float32, device="cpu"):
    scores = torch.randn(shape[0], device=device, dtype=dtype)
    logprobs = -torch.rand(shape, device=device).to(dtype)
    ref_logprobs = -torch.rand(shape, device=device).to(dtype)
    values = torch.randn(shape, device=device).to(dtype)
    mask = torch.rand(shape, device=device) > 0.3
    return scores, logprobs, ref_logprobs, values, mask


def double(tensors):
    return [x.double() if x.is_floating_point() else x for x in tensors]


def test_known_values():
    # Two tokens, kl_coef 0.5, gamma = lambda = 1, V = 0. KL terms: 0.5 * (-1 - -2) = 0.5 and 0.
    # rewards: -0.5, 0 + score 3 (clamped to 2); advantages: A1 = 2, A0 = -0.5 + 2 = 1.5.
    targets = ppo_advantage(
        torch.tensor([3.0]),
        torch.tensor([[-1.0, -1.0]]),
        torch.tensor([[-2.0, -1.0]]),
        torch.zeros(1, 2),
        torch.ones(1, 2, dtype=torch.bool),
        kl_coef=0.5,
        gamma=1.0,
        lambda_=1.0,
        reward_clip=2.0,
    )
    assert targets.rewards.tolist() == [[-0.5, 2.0]]
    assert targets.returns.tolist() == [[1.5, 2.0]]
    # mean 1.75, M2 = 2 * 0.25^2 = 0.125, var 0.0625: whitened to -1, 1
    assert targets.stats.tolist() == [2.0, 1.75, 0.125]
    assert targets.advantages[0].tolist() == pytest.approx([-1.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_matches_reference(device, dtype, shape, options, isa):
    tensors = inputs(shape, dtype, device)
    settings = dict(SETTINGS)
    if options == "everything":
        settings.update(
            reward_clip=0.7,
            whiten_rewards=True,
            unbiased=True,
            dones=torch.rand(shape, device=device) > 0.9,
            bootstrap=torch.randn(shape[0], device=device),
            score_index=torch.randint(-1, max(shape[1], 1), (shape[0],), device=device),
        )
    ours = ppo_advantage(*tensors, **settings)
    native = ppo_advantage_reference(*tensors, **settings)
    truth = ppo_advantage_reference(*double(tensors), **settings)
    for name in ("advantages", "returns", "rewards", "stats"):
        a, b, c = (getattr(x, name) for x in (ours, native, truth))
        assert a.dtype == torch.float32
        assert_close(a, b, c, name=name)


def test_bootstrap_of_any_float_type(device, dtype):
    tensors = inputs((3, 7), dtype, device)
    bootstrap = torch.randn(3, device=device).to(dtype)
    ours = ppo_advantage(*tensors, **SETTINGS, bootstrap=bootstrap)
    same = ppo_advantage(*tensors, **SETTINGS, bootstrap=bootstrap.float())
    for a, b in zip(ours, same, strict=True):
        assert_same_bits(a, b)
    with pytest.raises(TypeError, match="ppo_advantage: bootstrap must be float32, .* torch.int64"):
        ppo_advantage(*tensors, **SETTINGS, bootstrap=bootstrap.long())


def test_packed_equals_padded(device, backend):
    lengths = [5, 1, 33, 12]
    scores, logprobs, ref, values, mask = inputs((4, 33), device=device)
    inside = torch.arange(33, device=device) < torch.tensor(lengths, device=device)[:, None]
    mask &= inside
    cu = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    padded = ppo_advantage(scores, logprobs, ref, values, mask, **SETTINGS)
    packed = ppo_advantage(
        scores, *(x[inside] for x in (logprobs, ref, values, mask)), cu_seqlens=cu, **SETTINGS
    )
    tensors = (scores, logprobs, ref, values, mask)
    native = ppo_advantage_reference(*tensors, **SETTINGS)
    truth = ppo_advantage_reference(*double(tensors), **SETTINGS)
    for name in ("advantages", "returns", "rewards"):
        ours, other, n, t = (getattr(x, name) for x in (packed, padded, native, truth))
        # On CUDA tiles count from a row's end, padding included.
        if backend == "cpu" or name == "rewards":
            assert_same_bits(ours, other[inside], name)
        assert_close(ours, n[inside], t[inside], name=name)
    assert torch.allclose(packed.stats, padded.stats)


def test_rows_of_many_tiles(device):
    # 2500 steps: 2 tiles of a block, 10 of a warp; a row without a step, one whose mask ends early.
    tensors = inputs((3, 2500), device=device)
    mask = tensors[-1]
    mask[1] = False
    mask[2, 700:] = False
    dones = torch.rand(3, 2500, device=device) > 0.999
    # The first tokens of the same as if they were three packed rows.
    cu = torch.tensor([7, 1507, 1507, 2507], dtype=torch.int32, device=device)
    packed = [tensors[0], *(x.reshape(-1)[:2520] for x in tensors[1:])]
    packed[-1] = packed[-1].clone()
    packed[-1][:7] = packed[-1][2507:] = False
    cases = ((tensors, {"dones": dones}), (packed, {"cu_seqlens": cu, "whiten_rewards": True}))
    for arguments, options in cases:
        ours = ppo_advantage(*arguments, **SETTINGS, **options)
        native = ppo_advantage_reference(*arguments, **SETTINGS, **options)
        truth = ppo_advantage_reference(*double(arguments), **SETTINGS, **options)
        for name in ("advantages", "returns", "rewards", "stats"):
            assert_close(*(getattr(x, name) for x in (ours, native, truth)), name=name)
    plain = ppo_advantage(*tensors, **SETTINGS, dones=dones)
    white = ppo_advantage(*tensors, **SETTINGS, dones=dones, whiten_rewards=True)
    before, after = plain.rewards[mask].double(), white.rewards[mask].double()
    assert math.isclose(before.mean(), after.mean(), abs_tol=1e-6)
    assert abs(after.std(unbiased=False) - 1) < 1e-3


def test_deterministic(device, threads):
    tensors = inputs((259, 41), device=device)
    first = ppo_advantage(*tensors, whiten_rewards=True, **SETTINGS)
    for n in (1, 2, 3):
        threads(n)
        for a, b in zip(
            first, ppo_advantage(*tensors, whiten_rewards=True, **SETTINGS), strict=True
        ):
            assert_same_bits(a, b)


@pytest.mark.checklist(12)
def test_identities(device):
    scores, logprobs, ref, values, mask = inputs((50, 30), device=device)
    targets = ppo_advantage(scores, logprobs, ref, values, mask, **SETTINGS)
    kept = targets.advantages[mask].double()
    assert abs(kept.mean()) < 1e-6 and abs(kept.var(unbiased=False) - 1) < 1e-5
    assert targets.advantages[~mask].eq(0).all()
    # Without a KL term the rewards are the scores, paid at the last unmasked step.
    free = ppo_advantage(
        scores, logprobs, ref, values, mask, whiten=False, **{**SETTINGS, "kl_coef": 0.0}
    )
    assert torch.equal(free.rewards.sum(1), torch.where(mask.any(1), scores, 0.0))
    # GAE of those rewards is gae's, to the bit.
    advantages, returns = gae(free.rewards, values, mask, gamma=0.99, lambda_=0.95)
    assert_same_bits(free.advantages, advantages)
    assert_same_bits(free.returns, returns)
    # Merged statistics of two halves whiten as the whole does.
    halves = [
        ppo_advantage(*(x[part] for x in (scores, logprobs, ref, values, mask)), whiten=False,
                      **SETTINGS)
        for part in (slice(0, 20), slice(20, 50))
    ]  # fmt: skip
    (n1, m1, s1), (n2, m2, s2) = (h.stats.double().tolist() for h in halves)
    mean = (n1 * m1 + n2 * m2) / (n1 + n2)
    var = (s1 + s2 + (m2 - m1) ** 2 * n1 * n2 / (n1 + n2)) / (n1 + n2)
    merged = whiten_advantages(torch.cat([h.advantages for h in halves]), mask, mean, var)
    assert torch.allclose(merged, targets.advantages, atol=1e-5)
    # Whatever masked steps hold is not looked at.
    dirty = [torch.where(mask, x, float("nan")) for x in (logprobs, ref, values)]
    again = ppo_advantage(scores, *dirty, mask, **SETTINGS)
    for a, b in zip(targets, again, strict=True):
        assert_same_bits(a, b)
    # Whitened rewards keep their mean.
    white = ppo_advantage(scores, logprobs, ref, values, mask, whiten_rewards=True, **SETTINGS)
    before, after = targets.rewards[mask].double(), white.rewards[mask].double()
    assert math.isclose(before.mean(), after.mean(), abs_tol=1e-6)
    assert abs(after.std(unbiased=False) - 1) < 1e-3


@pytest.mark.checklist(17)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_merge(device, ranks):
    """Each rank's statistics, merged, whiten every rank as the whole batch is whitened."""
    tensors = inputs((8, 30), device=device)
    tensors[-1][-2:] = False  # the last of four ranks has nothing
    whole = ppo_advantage(*tensors, **SETTINGS)
    size = 8 // ranks
    local = [
        ppo_advantage(*(x[i : i + size] for x in tensors), whiten=False, **SETTINGS)
        for i in range(0, 8, size)
    ]
    counts, means, squares = torch.stack([r.stats for r in local]).double().unbind(1)
    count = counts.sum()
    mean = (counts * means).sum() / count
    var = (squares + counts * (means - mean) ** 2).sum() / count
    merged = [
        whiten_advantages(r.advantages, tensors[-1][i * size : (i + 1) * size], mean, var)
        for i, r in enumerate(local)
    ]
    assert torch.allclose(torch.cat(merged), whole.advantages, atol=1e-5)
    assert_same_bits(torch.cat([r.returns for r in local]), whole.returns)


def test_one_token_is_not_whitened():
    mask = torch.tensor([[False, True, False]])
    targets = ppo_advantage(torch.tensor([2.0]), *torch.zeros(3, 1, 3), mask, **SETTINGS)
    assert targets.advantages.tolist() == [[0.0, 2.0, 0.0]]
    nothing = ppo_advantage(torch.tensor([2.0]), *torch.zeros(3, 1, 3), mask & False, **SETTINGS)
    assert nothing.advantages.eq(0).all() and nothing.stats.eq(0).all()


@pytest.mark.parametrize("size", [0, 1, 97, 70000])
def test_whiten_advantages(device, size, threads):
    advantages, mask = torch.randn(size, device=device), torch.rand(size, device=device) > 0.5
    ours = whiten_advantages(advantages, mask, 0.3, 2.0)
    truth = whiten_advantages_reference(advantages.double(), mask, 0.3, 2.0)
    assert_close(ours, whiten_advantages_reference(advantages, mask, 0.3, 2.0), truth)
    threads(1)
    assert_same_bits(ours, whiten_advantages(advantages, mask, 0.3, 2.0))


@pytest.mark.big
def test_opcheck_and_compile(device):
    tensors = inputs((3, 7), device=device)
    op = torch.ops.instructcore.ppo_advantage.default
    settings = (0.05, 0.99, 0.95, -1.0, True, True, False)
    torch.library.opcheck(op, (*tensors, None, None, None, None, *settings))
    one = torch.ones((), device=device)
    torch.library.opcheck(
        torch.ops.instructcore.whiten_advantages.default, (tensors[1], tensors[4], one, one)
    )

    def shaped(*tensors):
        return ppo_advantage(*tensors, **SETTINGS)

    for a, b in zip(torch.compile(shaped, fullgraph=True)(*tensors), shaped(*tensors), strict=True):
        assert_same_bits(a, b)


def test_rejects():
    scores, logprobs, ref, values, mask = inputs((2, 3))

    def call(scores=scores, logprobs=logprobs, mask=mask, **options):
        return ppo_advantage(scores, logprobs, ref, values, mask, **SETTINGS, **options)

    with pytest.raises(TypeError, match="ppo_advantage: scores must be float32"):
        call(scores.double())
    with pytest.raises(ValueError, match=r"ppo_advantage: scores must be \(2,\), got \(3,\)"):
        call(torch.zeros(3))
    with pytest.raises(TypeError, match="ppo_advantage: mask must be torch.bool"):
        call(mask=mask.float())
    with pytest.raises(ValueError, match=r"logprobs must be \(B, T\)"):
        call(logprobs=logprobs[0])
    with pytest.raises(TypeError, match="score_index must be torch.int64"):
        call(score_index=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="score_index must be within its row"):
        call(score_index=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="reward_clip must be at least 0, got -1"):
        call(reward_clip=-1.0)
    assert call(torch.tensor([float("nan"), 0.0])).returns[0].isnan().any() == mask[0].any()
