from __future__ import annotations

import math

import pytest
import torch
from tolerance import assert_close, assert_same_bits

from instructcore import _C
from instructcore.ops import Penalties, sample, sample_reference, token_logprobs
from instructcore.ops.sample import gumbel_reference, philox_reference

# (N, V) and why
SHAPES = {
    (1, 1): "nothing to choose",
    (3, 7): "less than a vector",
    (5, 64): "whole vectors",
    (97, 64): "more rows than slots",
    (5, 1025): "one past whole vectors",
    (7, 50257): "GPT-2's vocabulary: many blocks, an odd end",
}
# A row is a block of threads, which costs the emulator a millisecond or two.
FEW_ROWS = 20


def by_rows(*values, rows=lambda value: value):
    """Parameters, of which the emulator gets those of few rows."""
    return [pytest.param(x, marks=pytest.mark.big if rows(x) > FEW_ROWS else ()) for x in values]


# What is set, and why
SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 5.0},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
}


def rows_of(n, device="cpu"):
    """Seeds and positions: a stream of its own for each row."""
    return {
        "seeds": torch.arange(n, device=device) * 0x9E3779B97F4A7C15 % (1 << 62) - (1 << 61),
        "positions": torch.arange(n, device=device) + (1 << 33),  # beyond 32 bits
    }


def extras(shape, device="cpu"):
    n, v = shape
    counts = torch.randint(-2, 4, shape, dtype=torch.int32, device=device).clamp(min=0)
    return {
        "bias": torch.randn(v, device=device),
        "penalties": Penalties(
            generated=counts,
            prompt=torch.rand(shape, device=device) > 0.7,
            repetition=torch.rand(n, device=device) + 0.7,
            presence=0.3,
            frequency=torch.rand(n, device=device),
        ),
        "allowed": (torch.rand(shape, device=device) > 0.3).index_fill(
            1, torch.tensor([0], device=device), True
        ),
    }


def chi_square(tokens, probabilities):
    """Pearson's statistic of the tokens' counts."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    return float(((counts - expected)[live] ** 2 / expected[live]).sum())


# Published with the authors' Random123 library, kat_vectors: counter, key, result.
PHILOX = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter, key, words", PHILOX)
def test_philox_known_answers(counter, key, words):
    assert _C.philox(counter, key) == words
    assert philox_reference(torch.tensor(counter), torch.tensor(key)).tolist() == words


def test_known_values(device):
    # Probabilities 1/8, 1/2, 1/4, 1/8.
    logits = torch.tensor([[0.125, 0.5, 0.25, 0.125]], device=device).log().repeat(80, 1)
    draws = {"seeds": 1, "positions": torch.arange(80, device=device)}

    def kept(**settings):
        tokens, logprobs, drawn = sample(logits, **settings, **draws)
        assert torch.allclose(logprobs, logits[0, tokens])
        found = {int(t): round(math.exp(p), 4) for t, p in zip(tokens, drawn, strict=True)}
        return dict(sorted(found.items()))

    assert kept() == {0: 0.125, 1: 0.5, 2: 0.25, 3: 0.125}
    assert kept(top_k=2) == {1: 0.6667, 2: 0.3333}
    assert kept(top_k=3) == {0: 0.1429, 1: 0.5714, 2: 0.2857}  # 0 before 3, its equal
    assert kept(top_p=0.45) == {1: 1.0}
    assert kept(top_p=0.55) == {1: 0.6667, 2: 0.3333}
    assert kept(top_p=0.8) == {0: 0.1429, 1: 0.5714, 2: 0.2857}
    assert kept(top_k=2, top_p=0.6) == {1: 1.0}  # of the two, 1 has 0.667 already
    assert kept(min_p=0.3) == {1: 0.6667, 2: 0.3333}
    # The square roots: (0.354, 0.707, 0.5, 0.354), sum 1.914.
    assert kept(temperature=2.0) == {0: 0.1847, 1: 0.3694, 2: 0.2612, 3: 0.1847}
    # Temperature comes before min_p: 0.5 / 0.707 is above 0.6 now.
    assert kept(temperature=2.0, min_p=0.6) == {1: 0.5858, 2: 0.4142}
    allowed = torch.tensor([[True, False, False, True]], device=device).expand(80, -1)
    assert kept(allowed=allowed) == {0: 0.5, 3: 0.5}
    bias = torch.tensor([0.0, -math.inf, math.log(2), 0.0], device=device)
    assert kept(bias=bias) == {0: 0.1667, 2: 0.6667, 3: 0.1667}
    # Logits (2, 1, -1, 0); token 0 occurs twice, 2 is in the prompt: x / 2 or x * 2, then off it.
    penalties = Penalties(
        torch.tensor([[2, 0, 0, 0]], dtype=torch.int32, device=device),
        torch.tensor([[False, False, True, False]], device=device),
        repetition=2.0,
        presence=0.25,
        frequency=0.5,
    )
    for token, value in enumerate((2 / 2 - 0.25 - 2 * 0.5, 1.0, -1 * 2, 0.0)):
        logits = torch.tensor([[2.0, 1.0, -1.0, 0.0]], device=device)
        others = torch.tensor([1.0 - 0.25 - 1.0, 1.0, -2.0, 0.0])
        allowed = torch.zeros(1, 4, dtype=torch.bool, device=device)
        allowed[0, [token, 1]] = True
        pair = {token, 1}
        expected = value - math.log(sum(math.exp(others[t]) for t in pair))
        drawn = [
            sample(logits, penalties=penalties, allowed=allowed, seeds=s, positions=0)
            for s in range(30)
        ]
        found = {float(d.sampled_logprobs) for d in drawn if int(d.tokens) == token}
        assert found and all(abs(x - expected) < 1e-6 for x in found)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", by_rows(*SHAPES, rows=lambda shape: shape[0]), ids=str)
def test_matches_reference(device, dtype, shape, settings):
    logits = (3 * torch.randn(shape)).to(device, dtype)
    for more in ({}, extras(shape, device)):
        options = {**SETTINGS[settings], **rows_of(shape[0], device), **more}
        ours = sample(logits, **options)
        native = sample_reference(logits, **options)
        truth = sample_reference(logits.double(), **options)
        assert ours.tokens.dtype == torch.int64
        assert torch.equal(ours.tokens, truth.tokens)
        assert torch.equal(ours.tokens, native.tokens)
        for i, name in ((1, "logprobs"), (2, "sampled_logprobs")):
            assert ours[i].dtype == torch.float32
            assert_close(ours[i], native[i], truth[i], name=f"{name} {settings}")


@pytest.mark.parametrize("n", by_rows(20, 512))
@pytest.mark.parametrize(
    "kind", ["random", "ties", "equal", "two values", "steep", "with -inf", "tiny", "huge"]
)
def test_truncations_against_a_sort(device, kind, isa, n):
    # Every row has its own settings; the mass of what is kept shows in sampled_logprobs.
    v = 203
    logits = torch.randn(n, v, device=device)
    if kind == "ties":
        logits = logits.mul(2).round() / 2
    elif kind == "equal":
        logits = torch.zeros(n, v, device=device)
    elif kind == "two values":
        logits = (logits > 0).float()
    elif kind == "steep":
        logits = torch.rand(n, v, device=device).pow(8) * 80
    elif kind == "with -inf":
        logits = torch.where(logits > 0.5, -math.inf, logits)
    elif kind == "tiny":
        logits = logits.sign() * 10 ** -torch.rand(n, v, device=device).mul(40)
    elif kind == "huge":  # both signs up to the largest float, and everything down to 1e-37
        logits = logits.sign() * 10 ** torch.rand(n, v, device=device).mul(75.5).sub(37)

    def some(values, off):
        return torch.where(torch.rand(n, device=device) < 0.6, values, off)

    settings = {
        "temperature": torch.rand(n, device=device) + 0.5,
        "top_k": some(torch.randint(1, v + 5, (n,), device=device), 0),
        "top_p": some(torch.rand(n, device=device), 1.0),
        "min_p": some(torch.rand(n, device=device).pow(3), 0.0),
        **rows_of(n, device),
    }
    ours = sample(logits, **settings)
    truth = sample_reference(logits.double(), **settings)
    assert torch.equal(ours.tokens, truth.tokens)
    # A kept token more or less would change the mass by its share, which mostly is above 1e-4.
    torch.testing.assert_close(
        ours.sampled_logprobs.double(), truth.sampled_logprobs, atol=2e-6, rtol=0
    )


@pytest.mark.big
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.6}, {"top_k": 6}, {"top_p": 0.7}, {"min_p": 0.2}], ids=str
)
def test_distribution(device, settings):
    # Fixed seeds, so the statistics are fixed too. 12 tokens: 11 degrees of freedom, 99.9 % of
    # the time below 31.3.
    n, v = 40_000, 12
    logits = torch.randn(v, device=device) * 1.5
    rows = logits.expand(n, v).contiguous()
    # The exact distribution, written out anew.
    z = logits.double() / settings.get("temperature", 1.0)
    p = z.softmax(-1)
    order = p.argsort(descending=True)
    keep = torch.ones(v, dtype=torch.bool, device=device)
    if "top_k" in settings:
        keep[order[settings["top_k"] :]] = False
    if "top_p" in settings:
        keep[order[1:]] = p[order].cumsum(0)[:-1] < settings["top_p"]
    if "min_p" in settings:
        keep = p >= settings["min_p"] * p.max()
    exact = torch.where(keep, p, 0.0).cpu()
    exact /= exact.sum()
    index = torch.arange(n, device=device)
    for seeds, positions in ((7, index), (index, 7), (index // 200, index % 200)):
        drawn = sample(rows, seeds=seeds, positions=positions, **settings)
        assert chi_square(drawn.tokens.cpu(), exact) < 31.3
        assert torch.allclose(
            drawn.sampled_logprobs.cpu().double().exp(), exact[drawn.tokens.cpu()]
        )


@pytest.mark.big
def test_distribution_of_many_tokens_and_of_pairs(device):
    n, v = 20_000, 4099
    logits = torch.randn(v, device=device) * 2
    tokens = sample(
        logits.expand(n, v).contiguous(), seeds=torch.arange(n, device=device), positions=3
    ).tokens.cpu()
    # 16 groups of all tokens: 15 degrees of freedom, 99.9 % below 37.7.
    groups = torch.zeros(16, dtype=torch.float64)
    groups.index_add_(0, torch.arange(v) % 16, logits.double().softmax(-1).cpu())
    assert chi_square(tokens % 16, groups) < 37.7
    # Tokens at neighbouring positions and with neighbouring seeds are independent: 16 - 1 degrees.
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    rows = p.log().float().to(device).expand(n, 4).contiguous()
    at = torch.arange(n, device=device)
    for other in ({"seeds": 1, "positions": at * 2 + 1}, {"seeds": 2, "positions": at * 2}):
        first = sample(rows, seeds=1, positions=at * 2).tokens
        pairs = (4 * first + sample(rows, **other).tokens).cpu()
        assert chi_square(pairs, torch.outer(p, p).flatten()) < 37.7


def test_noise_is_gumbel():
    noise = gumbel_reference(torch.arange(40), torch.arange(40), 5000, torch.float64).flatten()
    assert noise.isfinite().all()
    # Kolmogorov-Smirnov against exp(-exp(-x)): sqrt(n) times the distance is below 1.95 in 99.9 %.
    ordered = noise.sort().values
    distance = (torch.exp(-torch.exp(-ordered)) - torch.arange(200_000) / 200_000).abs().max()
    assert float(distance) * math.sqrt(200_000) < 1.95


@pytest.mark.parametrize("n", by_rows(11, 257))
def test_deterministic(device, threads, n):
    logits = torch.randn(n, 700, device=device)
    settings = {
        "temperature": torch.rand(n, device=device) * 2,
        "top_k": torch.randint(0, 50, (n,), device=device),
        "top_p": torch.rand(n, device=device),
        **rows_of(n, device),
        "bias": torch.randn(n, 700, device=device),
        "allowed": torch.rand(n, 700, device=device) > 0.5,
    }
    first = sample(logits, **settings)
    for count in (1, 2, 3):
        threads(count)
        for a, b in zip(first, sample(logits, **settings), strict=True):
            assert_same_bits(a, b)
    # A row alone, among others, or in another order gives the same.
    for rows in (torch.tensor([n - 1]), torch.randperm(n)[: n // 2]):
        part = sample(logits[rows], **{name: value[rows] for name, value in settings.items()})
        for a, b in zip(first, part, strict=True):
            assert_same_bits(a[rows], b)


def test_noise_far_below_its_mean(device):
    # The greatest of 1000 is about ln 1000, and within 2.5 below that but for one row in 200,000.
    seeds = torch.tensor([76611, 540313, 629343, 654070, 745516, 793816])
    noise = gumbel_reference(seeds, 0 * seeds, 1000, torch.float64)
    assert (noise.max(-1).values < math.log(1000) - 2.5).all()
    drawn = sample(torch.zeros(6, 1000, device=device), seeds=seeds.to(device), positions=0)
    assert torch.equal(drawn.tokens.cpu(), noise.argmax(-1))


def test_seeds_of_64_bits(device):
    logits = torch.randn(9, 700, device=device)
    for seed in (2**63, 2**63 + 12345, 2**64 - 1):
        wide = sample(logits, seeds=seed, positions=0)
        same = sample(logits, seeds=torch.tensor(seed - 2**64, device=device), positions=0)
        assert torch.equal(wide.tokens, same.tokens)
        assert not torch.equal(wide.tokens, sample(logits, seeds=seed - 2**63, positions=0).tokens)


def test_same_bits_with_and_without_avx512():
    levels = [level for level in _C.isa_levels() if level in ("x86_64_v3", "x86_64_v4")]
    if len(levels) < 2:
        pytest.skip("this machine has one of the two instruction sets at most")
    logits = torch.randn(33, 1025)
    drawn = []
    try:
        for level in levels:
            _C.set_isa(level)
            drawn.append(sample(logits, top_k=400, top_p=0.9, min_p=1e-3, **rows_of(33)))
    finally:
        _C.set_isa(_C.build_info()["isa_supported"])
    for a, b in zip(*drawn, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("vocab", [1, 97, 1025, 50257])
def test_identities(device, dtype, vocab):
    logits = (2 * torch.randn(9, vocab, device=device)).to(dtype)
    options = rows_of(9, device)
    for temperature in (1.0, 0.7, torch.rand(9, device=device) + 0.5):
        drawn = sample(logits, temperature=temperature, **options)
        raw = token_logprobs(logits, drawn.tokens, entropy=False).logprobs
        scaled = token_logprobs(logits, drawn.tokens, temperature=temperature, entropy=False)
        assert_same_bits(drawn.logprobs, raw)
        assert_same_bits(drawn.sampled_logprobs, scaled.logprobs)
    plain = sample(logits, **options)
    # Settings that change nothing, as numbers and as tensors.
    neutral = {
        "top_k": vocab + 1,
        "top_p": 1.0,
        "min_p": 0.0,
        "bias": torch.zeros(vocab, device=device),
    }
    tensors = {
        "temperature": torch.ones(9, device=device),
        "top_k": torch.zeros((), dtype=torch.int64, device=device),
        "top_p": torch.ones(9, 3, device=device)[:, 1],
        "penalties": Penalties(torch.ones(9, vocab, dtype=torch.int32, device=device)),
        "allowed": torch.ones(9, 1, dtype=torch.bool, device=device).expand(9, vocab),
    }
    for settings in (neutral, tensors):
        for a, b in zip(plain, sample(logits, **settings, **options), strict=True):
            assert_same_bits(a, b)
    # One token left: it is drawn, with probability 1 there and its own under the raw logits.
    greedy = sample(logits, temperature=0.0, **options)
    assert torch.equal(greedy.tokens, logits.float().argmax(-1))
    assert_same_bits(greedy.logprobs, greedy.sampled_logprobs)
    for settings in ({"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-6}):
        alone = sample(logits, **settings, **options)
        assert torch.equal(alone.tokens, greedy.tokens)
        assert_same_bits(alone.logprobs, greedy.logprobs)
        if "temperature" not in settings:
            assert alone.sampled_logprobs.eq(0).all()
    # Rows apart in memory, and columns.
    wide = torch.zeros(9, vocab + 5, device=device, dtype=dtype)
    wide[:, :vocab] = logits
    for view in (wide[:, :vocab], logits.T.contiguous().T):
        for a, b in zip(plain, sample(view, **options), strict=True):
            assert_same_bits(a, b)
    before = logits.clone()
    sample(logits, **extras((9, vocab), device), **options)
    assert torch.equal(before, logits)


def test_greedy_takes_the_lowest_of_equals(device):
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]], device=device)
    assert sample(logits, temperature=0.0, seeds=0, positions=0).tokens.tolist() == [1, 0]
    # Bias, penalties and disallowed tokens count at temperature 0 too; log-probabilities are raw.
    bias = torch.tensor([0.0, 0.0, 0.5, 2.0], device=device)
    drawn = sample(logits, temperature=0.0, bias=bias, seeds=0, positions=0)
    assert drawn.tokens.tolist() == [3, 3]
    torch.testing.assert_close(drawn.logprobs, logits.log_softmax(-1)[:, 3])
    assert_same_bits(drawn.logprobs, drawn.sampled_logprobs)


def test_opcheck_and_compile(device):
    logits = torch.randn(5, 33, device=device)
    more = extras((5, 33), device)
    penalties = more["penalties"]
    op = torch.ops.instructcore.sample.default
    floats, integers = [1.0, 0.9, 0.0, 1.0, 0.3, 0.0], [0, 1, 2]
    tensors = (torch.rand(5), None, torch.rand(5), penalties.repetition, None, penalties.frequency)
    rest = (None, torch.arange(5), torch.tensor(3))
    tensors, rest = ([None if x is None else x.to(device) for x in y] for y in (tensors, rest))
    wide = (more["bias"], penalties.generated, penalties.prompt, more["allowed"])
    torch.library.opcheck(op, (logits, *wide, *tensors, *rest, floats, integers))
    torch.library.opcheck(op, (logits, *[None] * 13, floats, integers))

    def step(logits, temperature, positions):
        return sample(2 * logits, temperature=temperature, top_p=0.9, seeds=3, positions=positions)

    arguments = (logits, torch.rand(5, device=device), torch.arange(5, device=device))
    compiled = torch.compile(step, fullgraph=True)(*arguments)
    for a, b in zip(compiled, step(*arguments), strict=True):
        assert_same_bits(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_stream_and_graph_cuda():
    if "sample" not in _C.build_info()["cuda_ops"]:
        pytest.skip("this build has no CUDA kernel for sample")
    logits = torch.randn(33, 1025, device="cuda")
    settings = {
        "temperature": torch.rand(33, device="cuda") + 0.5,
        "top_k": torch.randint(0, 50, (33,), device="cuda"),
        "top_p": torch.rand(33, device="cuda"),
        **rows_of(33, "cuda"),
    }
    expected = sample(logits, **settings)
    late = torch.zeros_like(logits)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(logits)  # on another stream the op would come before this
        found = sample(late, **settings)
    stream.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sample(logits, **settings)
    # The controls are read at each replay.
    settings["positions"] += 1
    settings["top_k"].fill_(3)
    graph.replay()
    for a, b in zip(found, sample(logits, **settings), strict=True):
        assert_same_bits(a, b)


def test_rejects(device):
    x = torch.randn(4, 6, device=device)

    def call(logits=x, seeds=0, positions=0, **settings):
        return sample(logits, seeds=seeds, positions=positions, **settings)

    with pytest.raises(TypeError, match="sample: logits must be float32.*float64"):
        call(x.double())
    with pytest.raises(ValueError, match=r"sample: logits must be \(N, V\)"):
        call(x[0])
    with pytest.raises(ValueError, match=r"sample: top_p must be in \[0.0, 1.0\], got 1.5"):
        call(top_p=1.5)
    with pytest.raises(ValueError, match="sample: temperature must be in .* got -1"):
        call(temperature=-1)
    with pytest.raises(ValueError, match="sample: min_p must be in .* got nan"):
        call(min_p=math.nan)
    with pytest.raises(TypeError, match="sample: seeds must be torch.int64, got torch.int32"):
        call(seeds=torch.zeros(4, dtype=torch.int32, device=device))
    with pytest.raises(TypeError, match="sample: temperature must be torch.float32"):
        call(temperature=torch.ones(4, dtype=torch.float64, device=device))
    with pytest.raises(
        ValueError, match=r"sample: temperature must be a number or \(4,\), got \(3,\)"
    ):
        call(temperature=torch.ones(3, device=device))
    with pytest.raises(ValueError, match=r"sample: bias must be \(4, 6\) or \(6,\), got \(4,\)"):
        call(bias=torch.zeros(4, device=device))
    with pytest.raises(TypeError, match="sample: allowed must be torch.bool"):
        call(allowed=torch.ones(4, 6, device=device))
    with pytest.raises(ValueError, match=r"sample: generated must be \(4, 6\)"):
        call(penalties=Penalties(torch.zeros(4, 5, dtype=torch.int32, device=device)))
    with pytest.raises(ValueError, match="sample: bias must be on .*, got meta"):
        call(bias=torch.zeros(6, device="meta"))
    with pytest.raises(ValueError, match="sample: repetition must be in"):
        call(penalties=Penalties(repetition=0.0))

    for bad in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=f"sample: seeds must have 64 bits, got {bad}"):
            call(seeds=bad)

    assert [t.shape for t in call(x[:0])] == [(0,)] * 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_to_draw(device, temperature):
    # -1 and NaN say so; the rows beside are as ever.
    logits = torch.randn(6, 50, device=device)
    options = {"temperature": temperature, "seeds": 0, "positions": torch.arange(6, device=device)}
    good = sample(logits, **options)
    bad = logits.clone()
    bad[1, 7], bad[2, 49], bad[3] = math.nan, math.inf, -math.inf
    allowed = torch.ones(6, 50, dtype=torch.bool, device=device)
    allowed[4] = False
    drawn = sample(bad, allowed=allowed, **options)
    reference = sample_reference(bad, allowed=allowed, **options)
    assert drawn.tokens[1:5].tolist() == [-1] * 4 == reference.tokens[1:5].tolist()
    assert drawn.logprobs[1:5].isnan().all() and drawn.sampled_logprobs[1:5].isnan().all()
    for a, b in zip(good, drawn, strict=True):
        assert_same_bits(a[[0, 5]], b[[0, 5]])
    # -inf beside finite logits is a token that is never drawn.
    half = logits.clone()
    half[:, ::2] = -math.inf
    assert (sample(half, **options).tokens % 2 == 1).all()
