from __future__ import annotations

import numpy
import pytest
import torch
from tolerance import assert_close, assert_same_bits

from instructcore.ops import gae, gae_reference

GAMMA, LAMBDA = 0.97, 0.9
GAMMA_LONG, LAMBDA_LONG = 1.0, 0.9995  # so that far steps are felt

# (B, T) and why
SHAPES = {
    (1, 1): "one step: advantage = r - V",
    (3, 7): "small and odd",
    (1, 1025): "one long row, past a power of two",
    (97, 33): "more rows than a chunk holds",
    (2, 0): "rows without steps",
    (0, 5): "no rows",
}


def inputs(shape, dtype=torch.float32, device="cpu"):
    rewards, values = torch.randn(2, *shape).to(device, dtype)
    mask = torch.rand(shape, device=device) > 0.2
    dones = torch.rand(shape, device=device) > 0.9
    bootstrap = torch.randn(shape[0], device=device)
    return rewards, values, mask, dones, bootstrap


@pytest.mark.checklist(14)
def test_known_values():
    # gamma = 0.5, lambda = 0.5, V(T) = 0, backwards:
    # t=2: delta = 3 + 0.5*0 - 1 = 2,      A = 2
    # t=1: delta = 2 + 0.5*1 - 1 = 1.5,    A = 1.5 + 0.25*2 = 2
    # t=0: delta = 1 + 0.5*1 - 2 = -0.5,   A = -0.5 + 0.25*2 = 0
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 1.0, 1.0]])
    advantages, returns = gae(rewards, values, gamma=0.5, lambda_=0.5)
    assert advantages.tolist() == [[0.0, 2.0, 2.0]]
    assert returns.tolist() == [[2.0, 3.0, 3.0]]
    # The episode ends after t=1, and V(T) = 4:
    # t=2: delta = 3 + 0.5*4 - 1 = 4, A = 4; t=1: state (0, 0): A = 2 - 1 = 1; t=0: -0.5 + 0.25*1
    advantages, _ = gae(
        rewards,
        values,
        gamma=0.5,
        lambda_=0.5,
        dones=torch.tensor([[False, True, False]]),
        bootstrap=torch.tensor([4.0]),
    )
    assert advantages.tolist() == [[-0.25, 1.0, 4.0]]
    # A masked step in the middle carries the state: as if it were not there.
    mask = torch.tensor([[True, False, True]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lambda_=0.5)
    assert advantages.tolist() == [[-0.5 + 0.25 * 2, 0.0, 2.0]]
    assert returns[0, 1] == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "time_major", "every_other_step"])
def test_matches_reference(device, dtype, shape, layout, isa):
    rewards, values, mask, dones, bootstrap = inputs(shape, dtype, device)
    if layout == "time_major":
        rewards, values, mask, dones = (x.T.contiguous().T for x in (rewards, values, mask, dones))
    if layout == "every_other_step":
        rewards, values = (x.repeat_interleave(2, 1)[:, ::2] for x in (rewards, values))
    options = {"gamma": GAMMA, "lambda_": LAMBDA, "dones": dones, "bootstrap": bootstrap}
    ours = gae(rewards, values, mask, **options)
    native = gae_reference(rewards, values, mask, **options)
    truth = gae_reference(rewards.double(), values.double(), mask, **options)
    for a, b, c, name in zip(ours, native, truth, ("advantages", "returns"), strict=True):
        assert a.dtype == torch.float32 and a.is_contiguous()
        assert_close(a, b, c, name=name)


@pytest.mark.parametrize("flags", ["few", "none"])
def test_long_runs_between_flags(device, dtype, isa, flags):
    rewards, values, mask, dones, bootstrap = inputs((6, 700), dtype, device)
    mask, dones = torch.rand(2, *mask.shape, device=device) < 1 / 64
    options = {"gamma": GAMMA_LONG, "lambda_": LAMBDA_LONG, "bootstrap": bootstrap}
    if flags == "few":
        options |= {"mask": ~mask, "dones": dones}
    ours = gae(rewards, values, **options)
    native = gae_reference(rewards, values, **options)
    truth = gae_reference(rewards.double(), values.double(), **options)
    for a, b, c, name in zip(ours, native, truth, ("advantages", "returns"), strict=True):
        assert_close(a, b, c, name=name)


@pytest.mark.parametrize(("left", "right"), [(0, 1), (3, 0), (5, 37)])
def test_padding_changes_no_bit(left, right, isa):
    rewards, values, *_ = inputs((4, 100))
    dones = torch.rand(4, 100) > 0.98
    mask = torch.rand(4, 100) > 0.02
    alone = gae(rewards, values, mask, gamma=GAMMA, lambda_=LAMBDA, dones=dones)
    padded = [torch.nn.functional.pad(x, (left, right)) for x in (rewards, values, mask, dones)]
    rewards, values, mask, dones = padded
    found = gae(rewards, values, mask, gamma=GAMMA, lambda_=LAMBDA, dones=dones)
    for a, b in zip(alone, found, strict=True):
        assert_same_bits(b[:, left : left + 100], a)


def test_packed_equals_each_row_alone(device):
    lengths = [5, 0, 1, 33, 12]
    cu = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    rewards, values, mask, dones, _ = (x for x in inputs((1, sum(lengths)), device=device))
    rewards, values, mask, dones = (x[0] for x in (rewards, values, mask, dones))
    bootstrap = torch.randn(len(lengths), device=device)
    packed = gae(
        rewards,
        values,
        mask,
        gamma=GAMMA,
        lambda_=LAMBDA,
        cu_seqlens=cu,
        dones=dones,
        bootstrap=bootstrap,
    )
    for b in range(len(lengths)):
        part = slice(int(cu[b]), int(cu[b + 1]))
        alone = gae(
            rewards[None, part],
            values[None, part],
            mask[None, part],
            gamma=GAMMA,
            lambda_=LAMBDA,
            dones=dones[None, part],
            bootstrap=bootstrap[b : b + 1],
        )
        for p, a in zip(packed, alone, strict=True):
            assert_same_bits(p[part], a[0])


def test_packed_steps_outside_every_row_are_zero(device):
    cu = torch.tensor([2, 4], dtype=torch.int32, device=device)
    advantages, _ = gae(
        torch.ones(6, device=device),
        torch.zeros(6, device=device),
        gamma=1.0,
        lambda_=1.0,
        cu_seqlens=cu,
    )
    assert advantages.tolist() == [0, 0, 2, 1, 0, 0]


def test_bootstrap_of_any_float_type(device, dtype):
    rewards, values, mask, dones, bootstrap = inputs((3, 7), dtype, device)
    options = {"gamma": GAMMA, "lambda_": LAMBDA, "dones": dones}
    low = bootstrap.to(dtype)
    for bootstrap in (low, low.repeat_interleave(2)[::2]):
        ours = gae(rewards, values, mask, bootstrap=bootstrap, **options)
        same = gae(rewards, values, mask, bootstrap=low.float(), **options)
        for a, b in zip(ours, same, strict=True):
            assert_same_bits(a, b)


def test_deterministic(device, threads):
    rewards, values, mask, dones, bootstrap = inputs((257, 129), device=device)
    options = {"gamma": GAMMA, "lambda_": LAMBDA, "dones": dones, "bootstrap": bootstrap}
    first = gae(rewards, values, mask, **options)
    for n in (1, 2, 3):
        threads(n)
        for a, b in zip(first, gae(rewards, values, mask, **options), strict=True):
            assert_same_bits(a, b)


@pytest.mark.checklist(13)
def test_identities(device, backend):
    rewards, values, _, _, _ = inputs((4, 50), device=device)
    # lambda = 1, gamma = 1: the return is the sum of the rewards to come.
    _, returns = gae(rewards, values, gamma=1.0, lambda_=1.0)
    to_come = rewards.double().flip(1).cumsum(1).flip(1)
    assert_close(returns, rewards.flip(1).cumsum(1).flip(1) + values - values, to_come)
    # lambda = 0: the one-step error.
    advantages, _ = gae(rewards, values, gamma=0.9, lambda_=0.0)
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    assert torch.allclose(advantages, rewards + 0.9 * after - values, atol=1e-6)
    # Padding is inert, whatever it holds: before a row to the bit. After it too on the CPU; on CUDA
    # it shifts the tiles, which count from the end.
    pad = torch.full((4, 3), float("nan"), device=device)
    no, yes = torch.zeros(4, 3, device=device).bool(), torch.ones(4, 50, device=device).bool()
    options = {"gamma": GAMMA, "lambda_": LAMBDA}
    plain = gae(rewards, values, **options)
    before, after = [pad, rewards], [pad, values]
    padded = gae(torch.cat(before, 1), torch.cat(after, 1), torch.cat([no, yes], 1), **options)
    for p, a in zip(padded, plain, strict=True):
        assert_same_bits(p[:, 3:], a)
        assert p[:, :3].eq(0).all()
    padded = gae(
        torch.cat([*before, pad], 1),
        torch.cat([*after, pad], 1),
        torch.cat([no, yes, no], 1),
        **options,
    )
    truth = gae_reference(rewards.double(), values.double(), **options)
    native = gae_reference(rewards, values, **options)
    for p, a, n, t in zip(padded, plain, native, truth, strict=True):
        if backend == "cpu":
            assert_same_bits(p[:, 3:53], a)
        assert_close(p[:, 3:53], n, t)
        assert p[:, :3].eq(0).all() and p[:, 53:].eq(0).all()


def in_series(rewards, values, mask, dones, bootstrap, dtype):
    """One row of gae_reference, in numpy: quick enough for a long row."""
    rewards, values = (x.cpu().numpy().astype(dtype) for x in (rewards, values))
    gamma, decay = dtype(GAMMA_LONG), dtype(GAMMA_LONG * LAMBDA_LONG)
    value, advantage = dtype(bootstrap), dtype(0)
    out = numpy.zeros(len(rewards), dtype)
    for t in reversed(range(len(rewards))):
        if dones[t]:
            value = advantage = dtype(0)
        if mask[t]:
            advantage = rewards[t] + gamma * value - values[t] + decay * advantage
            value = values[t]
            out[t] = advantage
    return torch.from_numpy(out)


# On CUDA a row is cut into tiles of 256 steps, or of 2048 where steps lie side by side; states are
# handed on in groups of 32 tiles.
@pytest.mark.parametrize(
    "layout, shape", [("rows", (1, 70_000)), ("time_major", (9, 9_000)), ("packed", (1, 30_000))]
)
def test_long_rows(device, threads, layout, shape):
    rewards, values, mask, dones, bootstrap = inputs(shape, device=device)
    dones = torch.rand(shape, device=device) > 0.9999
    mask[:, 3_000:6_000] = False  # whole tiles with nothing in them
    options = {"gamma": GAMMA_LONG, "lambda_": LAMBDA_LONG}
    tensors = (rewards, values, mask, dones)
    if layout == "time_major":
        rewards, values, mask, dones = (x.T.contiguous().T for x in tensors)
    ends = [0, shape[1]]
    if layout == "packed":
        rewards, values, mask, dones = (x[0] for x in tensors)
        ends = [0, 17, 17, 20_000, 20_300, 20_301, shape[1] - 5]
        options["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
        bootstrap = torch.randn(len(ends) - 1, device=device)
    ours = gae(rewards, values, mask, dones=dones, bootstrap=bootstrap, **options)
    rows = [(b, 0, shape[1]) for b in range(shape[0])]
    if layout == "packed":
        rows = [(b, *ends[b : b + 2]) for b in range(len(ends) - 1)]
    for b, first, last in rows:
        row = [x.reshape(-1, shape[1])[b if layout != "packed" else 0] for x in tensors]
        row = [x[first:last] for x in row] + [float(bootstrap[b])]
        got = ours[0].reshape(-1, shape[1])[b if layout != "packed" else 0, first:last]
        native, truth = in_series(*row, numpy.float32), in_series(*row, numpy.float64)
        assert_close(got, native, truth)
    for n in (1, 2, 3):
        threads(n)
        again = gae(rewards, values, mask, dones=dones, bootstrap=bootstrap, **options)
        for a, b in zip(ours, again, strict=True):
            assert_same_bits(a, b)


@pytest.mark.big
def test_opcheck_and_compile(device):
    rewards, values, mask, dones, bootstrap = inputs((3, 7), device=device)
    op = torch.ops.instructcore.gae.default
    torch.library.opcheck(op, (rewards, values, mask, None, dones, bootstrap, GAMMA, LAMBDA))
    cu = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
    torch.library.opcheck(op, (rewards[0], values[0], None, cu, None, None, GAMMA, LAMBDA))

    def shaped(rewards, values):
        return gae(2 * rewards, values, gamma=GAMMA, lambda_=LAMBDA)

    compiled = torch.compile(shaped, fullgraph=True)(rewards, values)
    for a, b in zip(compiled, shaped(rewards, values), strict=True):
        assert_same_bits(a, b)
    expanded = gae(rewards[:, :1].expand(-1, 7), values, gamma=GAMMA, lambda_=LAMBDA)
    copied = gae(rewards[:, :1].expand(-1, 7).clone(), values, gamma=GAMMA, lambda_=LAMBDA)
    assert_same_bits(expanded[0], copied[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_stream_and_graph_cuda():
    rewards, values, mask, dones, bootstrap = inputs((3, 5000), device="cuda")
    options = {"gamma": GAMMA, "lambda_": LAMBDA, "dones": dones, "bootstrap": bootstrap}
    expected = gae(rewards, values, mask, **options)
    late = torch.zeros_like(rewards)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(rewards)  # on another stream the op would come before this
        ours = gae(late, values, mask, **options)
    stream.synchronize()
    for a, b in zip(ours, expected, strict=True):
        assert_same_bits(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = gae(late, values, mask, **options)
    late.copy_(rewards.flip(0))
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(ours, gae(late, values, mask, **options), strict=True):
        assert_same_bits(a, b)


def test_no_gradient():
    rewards = torch.randn(2, 3, requires_grad=True)
    advantages, returns = gae(rewards, torch.randn(2, 3), gamma=1.0, lambda_=1.0)
    assert not advantages.requires_grad and not returns.requires_grad


def test_rejects():
    x = torch.randn(2, 3)

    def call(rewards=x, values=x, mask=None, **options):
        return gae(rewards, values, mask, gamma=1.0, lambda_=1.0, **options)

    with pytest.raises(TypeError, match="gae: rewards must be float32.*float64"):
        call(x.double())
    with pytest.raises(TypeError, match="gae: mask must be torch.bool"):
        call(mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"gae: values must be \(2, 3\), got \(2, 2\)"):
        call(values=x[:, :2])
    with pytest.raises(ValueError, match=r"gae: rewards must be \(B, T\), got \(3,\)"):
        call(x[0], x[0])
    with pytest.raises(ValueError, match=r"gae: rewards must be \(N,\)"):
        call(cu_seqlens=torch.tensor([0, 2], dtype=torch.int32))
    with pytest.raises(TypeError, match="gae: bootstrap must be float32, bfloat16 or float16, got"):
        call(bootstrap=torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"gae: bootstrap must be \(2,\)"):
        call(bootstrap=torch.zeros(3))
    with pytest.raises(ValueError, match="on cpu, got meta"):
        call(values=x.to("meta"))
    for bad in ([0, 4], [2, 1], [-1, 3]):
        with pytest.raises(RuntimeError, match="gae: cu_seqlens must"):
            call(x[0], x[0], cu_seqlens=torch.tensor(bad, dtype=torch.int32))
    nan = call(torch.tensor([[1.0, float("nan"), 1.0]]), torch.zeros(1, 3))[0]
    assert nan[0, :2].isnan().all() and nan[0, 2] == 1  # an unmasked NaN is shown, not hidden
