from __future__ import annotations

import pytest
import torch
from tolerance import assert_close, assert_differentiable_once, assert_same_bits

from instructcore import _C
from instructcore.ops import linear, linear_reference, linear_token_logprobs, token_logprobs
from instructcore.ops.linear import multiply, pack, packed_size

# (M, N, K) and why
SHAPES = {
    (1, 1, 1): "one number",
    (3, 70, 129): "few rows; a block of the sum and one; part of a panel",
    (4, 64, 256): "few rows, whole panels and blocks",
    (97, 130, 1025): "an odd sum in more parts than one",
    (13, 1030, 64): "a vocabulary, more panels than a task takes",
    (400, 40, 3000): "rows of several tasks, of which each goes over its sums again",
    (0, 5, 3): "no rows",
    (5, 0, 3): "no columns",
    (2, 3, 0): "no terms",
    (7, 3, 0): "no terms, more rows",
}
BITS = [s for s in SHAPES if 0 not in s]


def inputs(shape, dtype=torch.float32):
    rows, columns, depth = shape
    x = torch.randn(rows, depth).to(dtype)
    weight = (torch.randn(columns, depth) / max(1, depth) ** 0.5).to(dtype)
    return x, weight, torch.randn(columns).to(dtype)


def gradients(f, leaves, upstream, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves]
    y = f(*leaves)
    return torch.autograd.grad(y, leaves, upstream.to(y.dtype))


def test_known_values():
    x = torch.tensor([[1.0, 2.0, 3.0]]).requires_grad_()
    weight = torch.tensor([[1.0, 0.0, -1.0], [2.0, 1.0, 0.5]]).requires_grad_()
    bias = torch.tensor([10.0, -5.5]).requires_grad_()
    y = linear(x, weight, bias)  # 1 - 3 + 10, 2 + 2 + 1.5 - 5.5
    assert y.tolist() == [[8.0, 0.0]]
    y.backward(torch.tensor([[1.0, 2.0]]))
    assert x.grad.tolist() == [[5.0, 2.0, 0.0]]
    assert weight.grad.tolist() == [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]
    assert bias.grad.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "bias", "wide", "strided"])
def test_matches_reference(shape, dtype, form, isa, dirty_memory):
    x, weight, bias = inputs(shape, dtype)
    if form == "strided":  # rows apart by an odd number of elements, and a transposed weight
        x = torch.randn(shape[0], shape[2] + 3).to(dtype)[:, 1 : shape[2] + 1]
        weight = weight.t().contiguous().t()
    bias = None if form == "plain" else bias
    out = torch.float32 if form == "wide" else None
    ours = linear(x, weight, bias, out_dtype=out)
    native = linear_reference(x, weight, bias, out_dtype=out)
    truth = linear_reference(x, weight, bias, out_dtype=torch.float64)
    assert ours.dtype == (out or dtype)
    assert_close(ours, native, truth)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_gradients(shape, dtype, wide, isa, dirty_memory):
    leaves = inputs(shape, dtype)
    out = torch.float32 if wide else None
    upstream = torch.randn(shape[:2]).to(out or dtype)

    def ours(*leaves):
        return linear(*leaves, out_dtype=out)

    def plain(*leaves):
        return linear_reference(*leaves, out_dtype=out)

    found = zip(
        gradients(ours, leaves, upstream),
        gradients(plain, leaves, upstream),
        gradients(linear_reference, leaves, upstream, torch.float64),
        "xwb",
        strict=True,
    )
    for grad, native, truth, name in found:
        assert_close(grad, native, truth, name=name)


@pytest.mark.parametrize("shape", BITS, ids=str)
def test_a_row_has_its_bits_in_any_batch(shape, dtype, threads, isa):
    x, weight, bias = inputs(shape, dtype)
    threads(2)
    expected = linear(x, weight, bias)
    order = torch.randperm(len(x))
    for count in (1, 2):
        threads(count)
        for rows in (1, 2, 3, 5, 7, 64):
            parts = [linear(part, weight, bias) for part in x.split(rows)]
            assert_same_bits(torch.cat(parts), expected, f"{rows} rows, {count} threads")
        assert_same_bits(linear(x[order], weight, bias), expected[order], "in another order")
        wide = torch.full((len(x), shape[2] + 1), torch.nan, dtype=dtype)
        wide[:, :-1] = x
        assert_same_bits(linear(wide[:, :-1], weight, bias), expected, "strided")


# With few rows and many, and a last panel of one column, of a vector and of more.
@pytest.mark.parametrize("columns", [1, 64, 80, 97, 320])
@pytest.mark.parametrize("depth", [1, 64, 74, 1025, 3000])
def test_a_packed_weight_gives_the_same_bits(columns, depth, threads, isa, dirty_memory):
    x, weight, bias = inputs((70, columns, depth), torch.bfloat16)
    for count in (1, 3):
        threads(count)
        packed = pack(weight, torch.full((packed_size(weight),), torch.nan))
        for rows in (1, 2, 7, 16, 33, 70):
            for out in (torch.bfloat16, torch.float32):
                for b in (None, bias):
                    expected = linear(x[:rows], weight, b, out_dtype=out)
                    y = torch.empty(rows, columns, dtype=out)
                    multiply(x[:rows], packed, b, y)
                    assert_same_bits(y, expected, f"{rows} rows, {count} threads")


def test_rejects_a_packed_weight_of_another_shape():
    x, weight, _ = inputs((3, 40, 64), torch.bfloat16)
    packed = pack(weight, torch.empty(packed_size(weight)))
    for rows, columns in ((x[:, :48], 40), (x, 4000), (x.float(), 40)):
        with pytest.raises(
            RuntimeError, match="linear: a packed weight must be that of a bfloat16"
        ):
            multiply(rows, packed, None, torch.empty(3, columns))
    with pytest.raises(RuntimeError, match="linear: only a bfloat16 weight is packed"):
        pack(weight.float(), torch.empty(packed_size(weight)))


@pytest.mark.parametrize("shape", BITS, ids=str)
def test_gradients_are_deterministic(shape, dtype, threads):
    leaves, upstream = inputs(shape, dtype), torch.randn(shape[:2]).to(dtype)
    threads(1)
    expected = gradients(linear, leaves, upstream)
    for count in (2, 3):
        threads(count)
        for a, b in zip(gradients(linear, leaves, upstream), expected, strict=True):
            assert_same_bits(a, b)
    x, weight, bias = leaves
    for part, grad in zip(x.split(7), expected[0].split(7), strict=True):
        here = upstream[: len(part)]
        upstream = upstream[len(part) :]
        assert_same_bits(gradients(linear, (part, weight, bias), here)[0], grad)


@pytest.mark.skipif("x86_64_v3" not in _C.isa_levels(), reason="one level with an FMA")
@pytest.mark.parametrize("shape", BITS, ids=str)
def test_levels_with_an_fma_have_the_same_bits(shape, dtype):
    """bfloat16 too: the instruction for pairs rounds as the two multiply-adds in its stead."""
    leaves, upstream = inputs(shape, dtype), torch.randn(shape[:2]).to(dtype)
    best, found = _C.build_info()["isa"], []
    try:
        for level in ("x86_64_v3", "x86_64_v4")[: len(_C.isa_levels()) - 1]:
            _C.set_isa(level)
            found.append([linear(*leaves), *gradients(linear, leaves, upstream)])
    finally:
        _C.set_isa(best)
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert_same_bits(a, b)


@pytest.mark.skipif("x86_64_amx" not in _C.isa_levels(), reason="no matrix unit")
def test_the_matrix_unit_sums_groups_of_32():
    x, weight, _ = inputs((5, 40, 74), torch.bfloat16)  # two groups and a part of one
    total = torch.zeros(5, 40)
    for first in range(0, 74, 32):
        halves = []
        for start in (first, first + 1):  # even elements, odd elements: a fused chain each
            chain = torch.zeros(5, 40)
            for k in range(start, min(74, first + 32), 2):
                chain = (x[:, k, None].double() * weight[:, k].double() + chain.double()).float()
            halves.append(chain)
        total = total + (halves[0] + halves[1])
    assert_same_bits(linear(x, weight, out_dtype=torch.float32), total)


def test_identities(dtype):
    x, weight, bias = inputs((9, 65, 130), dtype)
    y = linear(x, weight, bias)
    # A column of y is a weight's row alone; leading dimensions are rows; a factor of two is exact.
    assert_same_bits(linear(x, weight[17:40], bias[17:40]), y[:, 17:40])
    assert_same_bits(linear(x.view(3, 3, 130), weight, bias), y.view(3, 3, 65))
    assert_same_bits(linear(x[4], weight, bias), y[4])
    assert_same_bits(linear(2 * x, weight), 2 * linear(x, weight))
    assert_same_bits(linear(x, weight, out_dtype=torch.float32).to(dtype), linear(x, weight))
    eye = torch.eye(130, dtype=dtype)
    assert_same_bits(linear(eye, weight), weight.t())


@pytest.mark.parametrize("workspace", [None, 1 << 17], ids=["whole", "chunks"])
def test_the_head_has_its_logits(dtype, workspace, threads):
    """The fused ops see the logits that a generator has, in any chunk and batch."""
    hidden, weight, bias = inputs((50, 1025, 200), dtype)
    targets = torch.randint(1025, (50,))
    threads(2)
    fused = linear_token_logprobs(hidden, weight, targets, bias=bias, max_workspace_bytes=workspace)
    threads(1)
    for i in range(0, 50, 3):
        logits = linear(hidden[i], weight, out_dtype=torch.float32) + bias.float()
        alone = token_logprobs(logits[None], targets[i : i + 1])
        assert_same_bits(fused.logprobs[i : i + 1], alone.logprobs)
        assert_same_bits(fused.lse[i : i + 1], alone.lse)


def test_opcheck_and_compile(dtype):
    x, weight, bias = (t.requires_grad_() for t in inputs((5, 9, 12), dtype))
    ops = torch.ops.instructcore
    for wide in (False, True):
        torch.library.opcheck(ops.linear.default, (x.detach(), weight.detach(), None, wide))
    grad = torch.randn(5, 9).to(dtype)
    detached = (x.detach(), weight.detach())
    torch.library.opcheck(ops.linear_backward.default, (grad, *detached, [True, False, True]))

    def step(x, weight, bias):
        return linear(x, weight, bias).float().square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    found = []
    for f in (step, compiled):
        loss = f(x, weight, bias)
        found.append([loss, *torch.autograd.grad(loss, (x, weight, bias))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_rejects():
    x, weight, bias = inputs((2, 3, 4))
    with pytest.raises(TypeError, match="linear: x must be float32, bfloat16 or float16"):
        linear(x.double(), weight.double())
    with pytest.raises(TypeError, match="linear: weight must be torch.float32, got"):
        linear(x, weight.half())
    with pytest.raises(TypeError, match="linear: bias must be torch.float32, got"):
        linear(x, weight, bias.half())
    with pytest.raises(ValueError, match=r"linear: x must be \(\.\.\., K\) and weight \(N, K\)"):
        linear(x, weight[:, :3])
    with pytest.raises(ValueError, match=r"linear: bias must be \(3,\), got \(2,\)"):
        linear(x, weight, bias[:2])
    with pytest.raises(ValueError, match="linear: weight must be on"):
        linear(x, weight.to("meta"))
    with pytest.raises(TypeError, match="linear: out_dtype must be torch.float32 or x's type"):
        linear(x, weight, out_dtype=torch.bfloat16)
    assert_differentiable_once("linear", lambda *a: linear(*a).square().sum(), x, weight, bias)


def test_infinities_and_nan_stay_in_their_rows(dtype, isa):
    x, weight, bias = inputs((9, 20, 131), dtype)
    expected = linear(x, weight, bias)
    x[4, 130], x[7, 3] = torch.inf, torch.nan
    y = linear(x, weight, bias)
    rest = [0, 1, 2, 3, 5, 6, 8]
    assert_same_bits(y[rest], expected[rest])
    assert y[4].isinf().all() and y[7].isnan().all()
