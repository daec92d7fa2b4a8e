from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from tolerance import assert_close, assert_differentiable_once, assert_same_bits
from torch._dynamo.backends.common import aot_autograd

from instructcore.ops import (
    attention,
    attention_paged_,
    attention_paged_reference,
    attention_reference,
    attention_varlen,
    attention_varlen_reference,
)

NAN = float("nan")

# (B, T, S, H, K, D) and why
SHAPES = {
    (1, 1, 33, 2, 2, 8): "one query, the smallest head dim, half a vector",
    (2, 7, 7, 2, 1, 24): "a vector and a half; grouped heads",
    (1, 64, 64, 4, 2, 32): "the pipeline's head dim",
    (2, 50, 97, 3, 3, 64): "more keys than queries, odd",
    (1, 97, 50, 6, 2, 16): "rows without a key when causal",
    (1, 300, 300, 2, 2, 80): "more than one block of keys, head dim past a panel's depth",
    (1, 25, 270, 2, 1, 256): "the largest head dim",
    (1, 40, 170, 2, 1, 96): "a head dim whose blocks of keys, by their size, would split a panel",
    (2, 5, 0, 2, 2, 8): "no keys",
    (2, 0, 5, 2, 2, 8): "no queries",
    (0, 5, 5, 2, 2, 8): "no sequences",
}
OPTIONS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": (20, 3)},
    "right_window": {"causal": False, "window": (None, 7), "scale": -0.3},
    "left_window": {"causal": False, "window": (40, 0)},
    "softcap": {"softcap": 2.0, "scale": 0.4},
    "alibi": {"alibi": 1},
    "alibi_per_row": {"alibi": 2, "causal": False},
    "sinks": {"sinks": True},
    "everything": {"softcap": 3.0, "alibi": 1, "sinks": True, "window": (33, 5), "causal": False},
}


def inputs(shape, dtype=torch.float32, device="cpu", layout="contiguous"):
    batch, queries, keys, heads, kv_heads, dim = shape
    tensors = []
    for rows, n in ((queries, heads), (keys, kv_heads), (keys, kv_heads)):
        if layout == "heads_first":
            x = torch.randn(batch, n, rows, dim).transpose(1, 2)
        elif layout == "slice":
            x = torch.randn(batch, rows, n, dim + 8)[..., 8:]
        else:
            x = torch.randn(batch, rows, n, dim)
        tensors.append(x.to(dtype).to(device))
    return tensors


def settings(name, shape, device="cpu"):
    batch, heads = shape[0], shape[3]
    options = dict(OPTIONS[name])
    alibi, sinks = options.pop("alibi", 0), options.pop("sinks", False)
    if alibi:
        options["alibi_slopes"] = 0.3 * torch.rand((heads,) if alibi == 1 else (batch, heads))
    if sinks:
        options["sinks"] = torch.randn(heads)
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def cast(options, dtype):
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def check_forward(q, k, v, options, op=attention, reference=attention_reference, more=()):
    out, lse = op(q, k, v, *more, **options, return_lse=True)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    native = reference(q, k, v, *more, **cast(options, q.dtype), return_lse=True)
    double = (x.double() for x in (q, k, v))
    truth = reference(*double, *more, **cast(options, torch.float64), return_lse=True)
    assert_close(out, native[0], truth[0], name="out")
    assert_close(lse, native[1].float(), truth[1], name="lse")


def test_known_values(device):
    # T = S = 2, one head, D = 8: the logits of query 1 are 0 and log 3, so its weights 1/4 and 3/4.
    q, k, v = (torch.zeros(1, 2, 1, 8, device=device) for _ in range(3))
    q[0, 1, 0, 0], k[0, 1, 0, 0] = 1.0, torch.log(torch.tensor(3.0))
    v[0, :, 0, 1] = torch.tensor([4.0, 8.0])
    out, lse = attention(q, k, v, scale=1.0, return_lse=True)
    assert out[0, 0, 0].tolist() == [0, 4, 0, 0, 0, 0, 0, 0]
    assert out[0, 1, 0, 1].item() == pytest.approx(0.25 * 4 + 0.75 * 8)
    assert lse[0, 0].tolist() == pytest.approx([0.0, 1.3862944], abs=1e-6)  # log 1, log 4
    # A sink of log 4 is as heavy as both keys together.
    sinks = torch.full((1,), 1.3862944, device=device)
    out, lse = attention(q, k, v, scale=1.0, sinks=sinks, return_lse=True)
    assert out[0, 1, 0, 1].item() == pytest.approx(3.5)
    assert lse[0, 0, 1].item() == pytest.approx(2.0794415)  # log 8
    # Slope log 2 halves key 0, one step away: weights 1/7 and 6/7.
    slopes = torch.full((1,), 0.6931472, device=device)
    out = attention(q, k, v, scale=1.0, alibi_slopes=slopes)
    assert out[0, 1, 0, 1].item() == pytest.approx(4 / 7 + 8 * 6 / 7)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(device, shape, name, isa):
    check_forward(*inputs(shape, device=device), settings(name, shape, device))


@pytest.mark.parametrize("layout", ["contiguous", "heads_first", "slice"])
@pytest.mark.parametrize("shape", [(2, 50, 97, 4, 2, 24), (1, 70, 70, 2, 2, 64)], ids=str)
def test_matches_reference_in_every_dtype_and_layout(device, dtype, shape, layout, isa):
    for name in ("causal", "everything"):
        check_forward(*inputs(shape, dtype, device, layout), settings(name, shape, device))


# What the tensor cores' kernels add: padded head dims, several tiles and segments of keys.
SHAPES_16 = {
    (1, 300, 300, 2, 1, 64): "tiles of rows and keys, odd",
    (1, 40, 1100, 2, 1, 80): "three segments of keys, a head dim that is padded",
    (2, 33, 70, 2, 2, 128): "no padding",
    (1, 70, 90, 1, 1, 200): "one warp's rows and more, the largest padded head dim",
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", [*SHAPES, *SHAPES_16], ids=str)
def test_matches_reference_in_16_bits(device, shape, name):
    dtype = torch.float16 if shape[0] == 2 else torch.bfloat16
    check_forward(*inputs(shape, dtype, device), settings(name, shape, device))


@pytest.mark.parametrize("window", [None, (5, 0)], ids=["before", "before_and_after"])
def test_tiles_whose_first_rows_end_before_a_block(window, isa):
    """By more than a vector, where the last rows see keys of the block, or by their window begin
    after one that the first rows see: a row without a key there writes nothing beside the tile."""
    shape = (1, 768, 776, 8, 8, 64)  # queries as many as a task has, and out of step with the keys
    check_forward(*inputs(shape, torch.bfloat16), {"window": window})


def test_same_bits_in_16_bits(device, threads):
    """A query's bits come from its own keys alone: across tiles and segments of them too."""
    q, k, v = inputs((2, 600, 600, 4, 2, 64), torch.bfloat16, device)
    full, full_lse = attention(q, k, v, return_lse=True)
    for t in (0, 31, 32, 63, 64, 511, 512, 599):
        step, lse = attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], return_lse=True)
        assert_same_bits(step, full[:, t : t + 1])
        assert_same_bits(lse, full_lse[..., t : t + 1])
    assert_same_bits(full[:, 450:577], attention(q[:, 450:577], k[:, :577], v[:, :577]))
    assert_same_bits(full[1:], attention(q[1:], k[1:], v[1:]))
    repeated = attention(q, *(x.repeat_interleave(2, dim=2) for x in (k, v)))
    assert_same_bits(full, repeated)
    assert_same_bits(full, attention(q, k, v, window=(600, 600)))
    assert_same_bits(full[:, 0], v[:, 0].repeat_interleave(2, dim=1))
    # Packed, with a stranger before and after.
    packs = [torch.cat([x[0, :77], x[1], x[0, :5]]) for x in (q, k, v)]
    cu = torch.tensor([0, 77, 677, 680], dtype=torch.int32, device=device)
    threads(2)
    out, lse = attention_varlen(*packs, cu, cu, return_lse=True)
    assert_same_bits(out[77:677], full[1])
    assert_same_bits(lse[:, 77:677], full_lse[1])
    assert out[680:].eq(0).all() and lse[:, 680:].eq(-torch.inf).all()


@pytest.mark.parametrize("poison", [NAN, float("inf")])
def test_hidden_values_do_not_leak_in_16_bits(device, poison):
    q, k, v = inputs((1, 150, 150, 2, 1, 64), torch.bfloat16, device)
    clean = attention(q, k, v)
    for x in (q, k, v):
        dirty = x.clone()
        dirty[:, 70:] = poison
        parts = [dirty if y is x else y for y in (q, k, v)]
        out = attention(*parts)
        assert_same_bits(out[:, :70], clean[:, :70])
        assert not out[:, 70:].isfinite().any()
    clean = attention(q, k, v, window=(30, 0))
    for x in (k, v):
        dirty = x.clone()
        dirty[:, :10] = poison
        out = attention(*(dirty if y is x else y for y in (q, k, v)), window=(30, 0))
        assert_same_bits(out[:, 40:], clean[:, 40:])
    # A NaN is seen in its own column, by those who see its key.
    v[0, 100, 0, 5] = NAN
    out = attention(q, k, v)
    assert out[0, 100:, :, 5].isnan().all() and out[0, :100].isfinite().all()
    assert out[0, 100:, :, 6:].isfinite().all()


def gradients(op, q, k, v, options, grad_out, grad_lse, more=()):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    leaves = [q, k, v]
    if options.get("sinks") is not None:
        options = {**options, "sinks": options["sinks"].detach().requires_grad_()}
        leaves.append(options["sinks"])
    out, lse = op(q, k, v, *more, **options, return_lse=True)
    seen = lse > -torch.inf
    total = (out * grad_out.to(out.dtype)).sum()
    if grad_lse is not None:
        total = total + (lse[seen] * grad_lse[seen].to(lse.dtype)).sum()
    return torch.autograd.grad(total, leaves)


def check_gradients(
    q, k, v, options, op=attention, reference=attention_reference, more=(), through_lse=True
):
    grad_out = torch.randn(q.shape).to(q)
    lse = reference(q, k, v, *more, **cast(options, q.dtype), return_lse=True)[1]
    grad_lse = torch.randn(lse.shape).to(q.device) if through_lse else None
    ours = gradients(op, q, k, v, options, grad_out, grad_lse, more)
    native = gradients(reference, q, k, v, cast(options, q.dtype), grad_out, grad_lse, more)
    double = [x.double() for x in (q, k, v)]
    truth = gradients(
        reference, *double, cast(options, torch.float64), grad_out.double(), grad_lse, more
    )
    for a, c in zip(ours, truth, strict=True):
        assert a.shape == c.shape and a.isfinite().all()
    # As one vector: the worst of torch's errors over a handful of elements is a matter of luck.
    vectors = (torch.cat([x.flatten().double() for x in grads]) for grads in (ours, native, truth))
    assert_close(*vectors, dtype=q.dtype, name="gradients")


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if 256 not in s], ids=str)
def test_gradients(device, shape, name):
    check_gradients(*inputs(shape, device=device), settings(name, shape, device))


@pytest.mark.parametrize("layout", ["contiguous", "heads_first"])
def test_gradients_in_every_dtype_and_layout(device, dtype, layout, isa):
    shape = (2, 50, 97, 4, 2, 24)
    for name, through_lse in (("causal", False), ("everything", True)):
        check_gradients(
            *inputs(shape, dtype, device, layout),
            settings(name, shape, device),
            through_lse=through_lse,
        )


def test_gradients_across_blocks_of_keys(device):
    shape = (1, 600, 530, 2, 1, 128)  # five tasks add to the same queries, in turn
    for name in ("causal", "left_window"):
        check_gradients(*inputs(shape, device=device), settings(name, shape, device))


# As SHAPES_16: blocks of 128 and of 64 keys and rows, tiles of 32 in them, heads in groups of both.
SHAPES_16_BACK = {
    (2, 1, 33, 4, 2, 8): "one query, the smallest head dim",
    (1, 7, 0, 2, 2, 8): "no keys",
    (1, 0, 7, 2, 2, 64): "no queries",
    (1, 150, 290, 2, 1, 64): "blocks of rows and of keys, odd",
    (2, 33, 70, 6, 2, 80): "a head dim that is padded, groups of three",
    (1, 140, 45, 2, 2, 128): "rows without a key when causal",
    (1, 70, 131, 2, 1, 256): "smaller blocks",
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES_16_BACK, ids=str)
def test_gradients_in_16_bits(device, shape, name):
    dtype = torch.float16 if shape[0] == 2 else torch.bfloat16
    check_gradients(*inputs(shape, dtype, device), settings(name, shape, device))


def test_unaligned_rows_give_the_same_bits_in_16_bits(device):
    tensors = inputs((2, 40, 70, 2, 1, 24), torch.bfloat16, device)
    tensors.append(torch.randn_like(tensors[0]))

    def run(q, k, v, grad):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves)
        return out, *torch.autograd.grad(out, leaves, grad)

    def shifted(x):
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), NAN)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]

    for a, b in zip(run(*tensors), run(*map(shifted, tensors)), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dim, n", [(64, 150), (256, 70)])
def test_same_gradient_bits_in_16_bits(device, threads, dim, n):
    """What a sequence gets comes from itself alone, in any order of a GPU's threads."""
    q, k, v = inputs((2, n, n, 2, 1, dim), torch.bfloat16, device)
    grad = torch.randn_like(q)

    def gradients_of(op, *tensors, grad):
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        return torch.autograd.grad(op(*leaves, *tensors[3:]), leaves, grad)

    both = gradients_of(attention, q, k, v, grad=grad)
    for order in (1, 2, 3):
        threads(order)
        second = gradients_of(attention, *(x[1:] for x in (q, k, v)), grad=grad[1:])
        for a, b in zip(both, second, strict=True):
            assert_same_bits(a[1:], b)
    # Packed, with a stranger before and after.
    cu = torch.tensor([0, 37, 37 + n, 40 + n], dtype=torch.int32, device=device)
    packs = [torch.cat([x[0, :37], x[1], x[0, :5]]) for x in (q, k, v, grad)]
    packs[3][40 + n :] = NAN
    for a, b in zip(
        both, gradients_of(attention_varlen, *packs[:3], cu, cu, grad=packs[3]), strict=True
    ):
        assert_same_bits(a[1], b[37 : 37 + n])
        assert b[40 + n :].eq(0).all()


@pytest.mark.parametrize("dim, n, poison", [(64, 10, NAN), (64, 10, float("inf")), (256, 5, NAN)])
def test_hidden_gradients_do_not_leak_in_16_bits(device, dim, n, poison):
    dtype = torch.bfloat16 if poison != poison else torch.float16
    q, k, v = inputs((1, 15 * n, 15 * n, 2, 1, dim), dtype, device)
    tensors = {"q": q, "k": k, "v": v, "grad": torch.randn_like(q)}

    def run(window=None, **changed):
        q, k, v, grad = {**tensors, **changed}.values()
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attention(*leaves, window=window), leaves, grad)

    def dirty(name, rows):
        x = tensors[name].clone()
        x[:, rows] = poison
        return {name: x}

    window = (3 * n, 0)
    clean, windowed = run(), run(window)
    for name in ("k", "v"):
        dq, _, _ = run(**dirty(name, slice(7 * n, None)))
        assert_same_bits(dq[:, : 7 * n], clean[0][:, : 7 * n])
        # Keys before n are to the left of what queries from 4 n on see, and of who shares a key
        # with those.
        for a, b in zip(run(window, **dirty(name, slice(n))), windowed, strict=True):
            assert_same_bits(a[:, 4 * n :], b[:, 4 * n :])
    for name in ("q", "grad"):
        for a, b in zip(run(**dirty(name, slice(7 * n))), clean, strict=True):
            assert_same_bits(a[:, 7 * n :], b[:, 7 * n :])
        for a, b in zip(run(window, **dirty(name, slice(10 * n, None))), windowed, strict=True):
            assert_same_bits(a[:, : 7 * n], b[:, : 7 * n])
    # What is seen shows: in its own column of dv and in dk, of the keys that it sees; in its dq.
    grad, t = tensors["grad"].clone(), 10 * n
    grad[0, t, 1, 5] = poison
    dq, dk, dv = run(grad=grad)
    for x in (dk, dv):
        assert not x[0, : t + 1, 0, 5].isfinite().any() and x[0, t + 1 :].isfinite().all()
    assert dv[0, :, 0, 6:].isfinite().all()
    assert not dq[0, t, 1].isfinite().any() and dq[0, t, 0].isfinite().all()
    assert dq[0, :t].isfinite().all() and dq[0, t + 1 :].isfinite().all()


LENGTHS_Q, LENGTHS_K = [5, 0, 1, 70, 12, 3], [5, 4, 0, 70, 300, 1]


def packed(dtype=torch.float32, device="cpu", heads=4, kv_heads=2, dim=32, same=False):
    """q, k, v, cu_seqlens_q, cu_seqlens_k, with rows before and after all sequences: before, more
    than a block of a kernel takes."""
    cu_q = torch.tensor([130, *LENGTHS_Q]).cumsum(0)
    cu_k = cu_q if same else torch.tensor([67, *LENGTHS_K]).cumsum(0)
    rows_q, rows_k = int(cu_q[-1]) + 3, int(cu_k[-1]) + 2
    rows_k = rows_q if same else rows_k
    q = torch.randn(rows_q, heads, dim).to(dtype)
    k, v = (torch.randn(rows_k, kv_heads, dim).to(dtype) for _ in range(2))
    return tuple(x.to(device) for x in (q, k, v, cu_q.int(), cu_k.int()))


@pytest.mark.parametrize("name", ["causal", "full", "everything", "alibi_per_row"])
def test_varlen_matches_reference(device, dtype, name):
    q, k, v, cu_q, cu_k = packed(dtype, device)
    options = settings(name, (len(LENGTHS_Q), 0, 0, 4, 2, 32), device)
    check_forward(q, k, v, options, attention_varlen, attention_varlen_reference, more=(cu_q, cu_k))


@pytest.mark.parametrize("name", ["causal", "everything"])
def test_varlen_gradients(device, dtype, name):
    q, k, v, cu_q, cu_k = packed(dtype, device)
    options = settings(name, (len(LENGTHS_Q), 0, 0, 4, 2, 32), device)
    check_gradients(
        q, k, v, options, attention_varlen, attention_varlen_reference, more=(cu_q, cu_k)
    )


def test_more_sequences_than_tokens(device, dtype):
    lengths = torch.zeros(40).int()
    lengths[[7, 30]] = torch.tensor([1, 2]).int()
    cu = torch.cat((torch.zeros(1).int(), lengths.cumsum(0).int())).to(device)
    q, k, v = (torch.randn(3, heads, 64).to(device, dtype) for heads in (4, 2, 2))
    out = attention_varlen(q, k, v, cu, cu)
    for begin, end in ((0, 1), (1, 3)):
        alone = attention(*(x[None, begin:end] for x in (q, k, v)))
        assert_same_bits(out[begin:end], alone[0])
    many = torch.randn(2, 600, 2, 64).to(device, dtype)  # keys of several segments
    cu_k = torch.where(cu >= 1, 600, 0).int()
    out = attention_varlen(q, *many, cu, cu_k)
    assert_same_bits(out[:1], attention(q[None, :1], *(x[None] for x in many))[0])


def test_varlen_equals_each_sequence_alone(device, dtype):
    q, k, v, cu_q, cu_k = packed(dtype, device)
    grad = torch.randn_like(q)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention_varlen(q, k, v, cu_q, cu_k, return_lse=True)
    grads = torch.autograd.grad(out, leaves, grad)
    for b in range(len(LENGTHS_Q)):
        rows = slice(int(cu_q[b]), int(cu_q[b + 1]))
        keys = slice(int(cu_k[b]), int(cu_k[b + 1]))
        alone, alone_lse = attention(q[None, rows], k[None, keys], v[None, keys], return_lse=True)
        assert_same_bits(out[rows], alone[0])
        assert_same_bits(lse[:, rows], alone_lse[0])
        expected = torch.autograd.grad(alone, leaves, grad[None, rows])
        for part, whole, alone in zip((rows, keys, keys), grads, expected, strict=True):
            assert_same_bits(whole[part], alone[part])


def test_rows_of_no_sequence_are_zero(device, dtype):
    q, k, v, cu_q, cu_k = packed(dtype, device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention_varlen(q, k, v, cu_q, cu_k, return_lse=True)
    grads = torch.autograd.grad(out, leaves, torch.full_like(out, NAN))
    for x, cu in ((out, cu_q), (grads[0], cu_q), (grads[1], cu_k), (grads[2], cu_k)):
        assert x[: cu[0]].eq(0).all() and x[cu[-1] :].eq(0).all()
    assert lse[:, cu_q[-1] :].eq(-torch.inf).all()
    none = cu_q.new_zeros(1)  # no sequence at all
    out, lse = attention_varlen(q, k, v, none, none, return_lse=True)
    grads = torch.autograd.grad(out, leaves, torch.full_like(out, NAN))
    assert all(x.eq(0).all() for x in (out, *grads)) and lse.eq(-torch.inf).all()


def test_rows_without_keys(device, dtype):
    q, k, v = inputs((1, 5, 3, 2, 2, 16), dtype, device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for sinks in (None, torch.tensor([0.5, -1.0], device=device)):
        out, lse = attention(q, k, v, sinks=sinks, return_lse=True)
        blind = [-torch.inf] * 2 if sinks is None else sinks.tolist()
        assert out[0, :2].eq(0).all() and lse[0, :, 0].tolist() == blind
        grad_out, grad_lse = torch.ones_like(out), torch.ones_like(lse)
        grad_out[0, :2] = NAN  # a gradient that goes nowhere
        grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
        assert grads[0][0, :2].eq(0).all()
        assert all(g.isfinite().all() for g in grads)


def test_rows_without_keys_give_their_sink_no_gradient(device, dtype):
    sinks = torch.tensor([0.5, -1.0], device=device, requires_grad=True)

    def gradient(q, k, v, poison):
        out, lse = attention(q, k, v, sinks=sinks, return_lse=True)
        blind = max(q.shape[1] - k.shape[1], 0)
        grad_out, grad_lse = torch.ones_like(out), torch.ones_like(lse)
        grad_out[:, :blind], grad_lse[..., :blind] = poison, poison
        return torch.autograd.grad((out, lse), sinks, (grad_out, grad_lse))[0]

    q, k, v = inputs((1, 5, 3, 2, 2, 16), dtype, device)
    seeing = gradient(q[:, 2:], k, v, 1.0)
    assert seeing.ne(0).all()
    for poison in (1.0, NAN):
        assert_same_bits(gradient(q, k, v, poison), seeing)
        assert gradient(q, k[:, :0], v[:, :0], poison).eq(0).all()


@pytest.mark.parametrize("poison", [NAN, float("inf"), -float("inf")])
def test_hidden_values_do_not_leak(device, poison, isa):
    q, k, v = inputs((1, 40, 40, 4, 2, 32), device=device)
    grad = torch.randn_like(q)

    def run(last, **options):  # what the first 20 queries get, and give
        parts = [torch.cat([x[:, :20], last(x[:, 20:])], 1).requires_grad_() for x in (q, k, v)]
        out, lse = attention(*parts, **options, return_lse=True)
        grad_out = torch.cat([grad[:, :20], torch.zeros_like(grad[:, 20:])], 1)
        dq, _, _ = torch.autograd.grad(out, parts, grad_out)
        return out[:, :20], lse[..., :20], dq[:, :20]

    for clean, dirty in zip(
        run(lambda x: x), run(lambda x: torch.full_like(x, poison)), strict=True
    ):
        assert_same_bits(clean, dirty)
    # To the left of a window: keys 0 .. 9 are hidden from queries 20 .. 39.
    for name in "kv":
        parts = {"q": q, "k": k.clone(), "v": v.clone()}
        clean = attention(**parts, window=(10, 0))
        parts[name][:, :10] = poison
        assert_same_bits(clean[:, 20:], attention(**parts, window=(10, 0))[:, 20:])
    # What is seen is shown.
    v = v.clone()
    v[0, 5] = NAN
    out = attention(q, k, v)
    assert out[:, 5:].isnan().all() and out[:, :5].isfinite().all()


@pytest.mark.parametrize(
    "shape",
    [(2, 40, 70, 4, 2, 32), pytest.param((3, 130, 400, 4, 2, 64), marks=pytest.mark.big)],
    ids=str,
)
def test_deterministic(device, threads, shape):
    q, k, v = inputs(shape, device=device)
    grad = torch.randn_like(q)
    packs = packed(device=device)

    def run():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = attention(*leaves, return_lse=True)
        short = attention_varlen(*packs)
        return out, lse, short, *torch.autograd.grad(out, leaves, grad)

    first = run()
    for n in (1, 2, 3):
        threads(n)
        for a, b in zip(first, run(), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_with_and_without_avx512(dtype):
    from instructcore import _C

    if "x86_64_v4" not in _C.isa_levels():
        pytest.skip("no AVX-512 here")
    q, k, v = inputs((2, 70, 300, 4, 2, 72), dtype)
    best, results = _C.build_info()["isa"], []
    try:
        for level in ("x86_64_v3", "x86_64_v4"):
            _C.set_isa(level)
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out, lse = attention(*leaves, softcap=5.0, return_lse=True)
            results.append((out, lse, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    finally:
        _C.set_isa(best)
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_identities(device):
    q, k, v = inputs((2, 90, 90, 4, 2, 64), device=device)
    full, full_lse = attention(q, k, v, return_lse=True)
    # Query t of a causal pass is a decode step over t + 1 keys, bit for bit; chunks of queries too.
    for t in (0, 1, 15, 16, 63, 64, 89):
        step, lse = attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], return_lse=True)
        assert_same_bits(step, full[:, t : t + 1])
        assert_same_bits(lse, full_lse[..., t : t + 1])
    chunk = attention(q[:, 40:77], k[:, :77], v[:, :77])
    assert_same_bits(chunk, full[:, 40:77])
    # One visible key: out is its value, exactly.
    assert_same_bits(full[:, 0], v[:, 0].repeat_interleave(2, dim=1))
    # A batch is its rows; grouped heads are repeated keys; a window over everything is none.
    assert_same_bits(full[1:], attention(q[1:], k[1:], v[1:]))
    repeated = attention(q, *(x.repeat_interleave(2, dim=2) for x in (k, v)))
    assert_same_bits(full, repeated)
    assert_same_bits(full, attention(q, k, v, window=(90, 90)))
    # Halves of the keys merge through lse.
    parts = [
        attention(q, k[:, part], v[:, part], causal=False, return_lse=True)
        for part in (slice(0, 30), slice(30, 90))
    ]
    whole, lse = attention(q, k, v, causal=False, return_lse=True)
    merged = sum(out * (part_lse - lse).exp().transpose(1, 2)[..., None] for out, part_lse in parts)
    assert torch.allclose(merged, whole, atol=2e-6)
    # Weights add up to 1: values of 1 give 1, and the gradient of v adds up to that of out.
    ones = torch.ones_like(v).requires_grad_()
    out = attention(q, k, ones)
    assert torch.allclose(out, torch.ones_like(out), atol=1e-6)
    grad = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, ones, grad)
    assert torch.allclose(dv.sum((1, 2)), grad.sum((1, 2)), atol=1e-3)


def paged(
    lengths,
    counts,
    dtype=torch.float32,
    cache_dtype=None,
    device="cpu",
    dim=32,
    size=8,
    heads=(4, 2),
    gap=0,
    layout="contiguous",
):
    """Random caches that hold `lengths` tokens and `counts` queries to come, blocks shuffled.

    `gap` rows before and after those of the sequences belong to none.
    """
    most = max(-(-(n + m) // size) for n, m in zip(lengths, counts, strict=True)) + 1
    blocks = len(lengths) * most + 3
    order = torch.randperm(blocks)[: len(lengths) * most].reshape(len(lengths), most)
    table = torch.full((len(lengths), most), -1)
    for b, (n, m) in enumerate(zip(lengths, counts, strict=True)):
        used = -(-(n + m) // size)
        table[b, :used] = order[b, :used]
    wide = dim + (5 if layout == "unaligned" else 0)
    caches = [
        torch.randn(blocks, size, heads[1], wide).to(cache_dtype or dtype).to(device)[..., :dim]
        for _ in range(2)
    ]
    rows = sum(counts) + 2 * gap
    q = torch.randn(rows, heads[0], wide).to(dtype)[..., :dim]
    new = [torch.randn(rows, heads[1], wide).to(dtype).to(device)[..., :dim] for _ in range(2)]
    cu = torch.tensor([gap, *counts]).cumsum(0).int()
    held = torch.tensor(lengths, dtype=torch.int32)
    tensors = [q, *caches, table.int(), held, cu]
    return [x.to(device) for x in tensors], dict(zip(("k_new", "v_new"), new, strict=True))


# tokens held and tokens new: decode steps, a first prefill, a chunk, nothing at all
HELD, NEW = [17, 0, 31, 5, 8], [1, 20, 9, 0, 1]


@pytest.mark.parametrize("cache_dtype", [None, torch.bfloat16], ids=["", "bfloat16_cache"])
@pytest.mark.parametrize("turn", ["", "halves", "interleaved"])
def test_paged_matches_reference(device, dtype, cache_dtype, turn):
    arguments, new = paged(HELD, NEW, dtype, cache_dtype, device)
    options = {"sinks": torch.randn(4, device=device), "window": (25, 0)}
    check_paged(arguments, new, options, turn)


HALVES = [torch.bfloat16, torch.float16]
# What the kernels on tensor cores tell apart: (held, new, paged()'s settings, options, turn)
PAGED = {
    "decode": ([1100, 37, 512, 511], [1, 1, 1, 1], {"dim": 64, "size": 16}, "causal", ""),
    "grouped_by_4": (
        [1100, 600],
        [1, 2],
        {"dim": 80, "size": 48, "heads": (4, 1)},
        "causal",
        "halves",
    ),
    "grouped_by_8": ([700], [2], {"dim": 128, "size": 16, "heads": (8, 1)}, "sinks", "interleaved"),
    "rows_apart": (
        [1000, 3],
        [3, 8],
        {"dim": 128, "size": 48, "heads": (8, 1)},
        "causal",
        "halves",
    ),
    "chunk": ([500, 1030, 0, 9], [70, 1, 40, 0], {"dim": 64, "size": 48}, "causal", "halves"),
    "odd_group": ([3], [50], {"dim": 64, "size": 7, "heads": (6, 2)}, "alibi", "interleaved"),
    "dim_256": ([520, 2], [1, 20], {"dim": 256, "size": 16, "heads": (2, 1)}, "sinks", "halves"),
    "odd_half": ([600], [2], {"dim": 24, "size": 16, "heads": (2, 1)}, "softcap", "halves"),
    "left_window": ([1100, 560], [1, 9], {"dim": 64, "size": 16}, "left_window", ""),
    "wide_window": ([1200, 0], [4, 30], {"dim": 64, "size": 16}, "wide_window", "halves"),
    "everything": ([540, 12], [3, 20], {"dim": 72, "size": 16}, "everything", "halves"),
    "alibi_per_row": ([540, 12], [3, 6], {"dim": 40, "heads": (6, 2)}, "alibi_per_row", ""),
    "unaligned": ([530, 3], [2, 30], {"dim": 24, "layout": "unaligned"}, "causal", "halves"),
    # 3200 slots wanted, 3024 on the emulator's GPU: the first two sequences go without.
    "too_few_slots": (
        [530, *[520] * 6],
        [2, *[8] * 6],
        {"dim": 256, "size": 16, "heads": (32, 4)},
        "left_window",
        "",
    ),
}
OPTIONS["wide_window"] = {"window": (600, 0)}


@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", PAGED)
def test_paged_in_pieces(device, dtype, case):
    held, new, sizes, name, turn = PAGED[case]
    arguments, new = paged(held, new, dtype, device=device, gap=2, **sizes)
    options = settings(name, (len(held), 0, 0, arguments[0].shape[1]), device)
    check_paged(arguments, new, options, turn)


@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
def test_paged_deterministic(device, dtype, threads):
    cases = [
        paged(held, new, dtype, device=device, dim=64, heads=heads, size=48)
        for held, new, heads in (([700, 3], [1, 70], (4, 2)), ([1030], [5], (8, 1)))
    ]

    def run():
        results = []
        for (q, k_cache, v_cache, *tables), new in cases:
            caches = [k_cache.clone(), v_cache.clone()]
            results += attention_paged_(q, *caches, *tables, **new, return_lse=True)
            results += caches
        return results

    first = run()
    for n in (1, 2, 3):
        threads(n)
        for a, b in zip(first, run(), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
def test_paged_reads_only_its_own(device, dtype):
    """NaN in free blocks, in rows past a sequence's end and in hidden keys reaches nobody."""
    held, new = [530, 12, 70], [1, 20, 3]
    (q, *caches, table, lengths, cu), added = paged(
        held, new, dtype, device=device, dim=64, size=48
    )
    options = {**added, "window": (40, 0)}
    results = []
    for poisoned in (False, True):
        pages = [x.clone() for x in caches]
        if poisoned:
            for x in pages:
                kept = torch.full_like(x, NAN)
                for b, n in enumerate(held):
                    at = torch.arange(max(n - 40, 0), n, device=device)  # what query 0 sees
                    block = table[b, at // 48].long()
                    kept[block, at % 48] = x[block, at % 48]
                x.copy_(kept)
        results.append(attention_paged_(q, *pages, table, lengths, cu, **options, return_lse=True))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)
    assert results[0][0].isfinite().all()
    # A hidden new value stays hidden: query t does not see token t + 1.
    added["v_new"] = added["v_new"].clone()
    added["v_new"][-1] = NAN
    out = attention_paged_(q, *caches, table, lengths, cu, **added)
    assert out[:-1].isfinite().all() and out[-1].isnan().all()


@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("group", [1, 4])
def test_paged_equals_dense_across_segments(device, dtype, group):
    """Decode, chunks and a prefill of 530 tokens: one set of bits, the dense pass's."""
    tokens, dim, size = 530, 64, 48
    q, k, v = (x[0] for x in inputs((1, tokens, tokens, group, 1, dim), dtype, device))
    dense, dense_lse = attention(q[None], k[None], v[None], window=(100, 0), return_lse=True)
    blocks = -(-tokens // size)
    table = torch.randperm(blocks).to(device)[None].int()
    caches = [torch.full((blocks, size, 1, dim), NAN, dtype=dtype, device=device) for _ in range(2)]
    cuts = [0, 300, 509, 510, 511, 512, 513, 516, tokens]
    for first, last in zip(cuts, cuts[1:], strict=False):
        held = torch.tensor([first], dtype=torch.int32, device=device)
        cu = torch.tensor([0, last - first], dtype=torch.int32, device=device)
        rows = slice(first, last)
        out, lse = attention_paged_(
            q[rows],
            *caches,
            table,
            held,
            cu,
            k_new=k[rows],
            v_new=v[rows],
            window=(100, 0),
            return_lse=True,
        )
        assert_same_bits(out, dense[0, rows], f"{first} to {last}")
        assert_same_bits(lse, dense_lse[0][:, rows], f"{first} to {last}")


def check_paged(arguments, new, options, turn=""):
    device, dtype, dim = arguments[0].device, arguments[0].dtype, arguments[0].shape[2]
    options = {**new, **options}
    if turn:
        angles = torch.rand(int(arguments[4].max()) + 100, dim // 2, device=device) * 6
        options |= {"cos": angles.cos(), "sin": angles.sin(), "interleaved": turn == "interleaved"}
    results = []
    for f, kind in (
        (attention_paged_, dtype),
        (attention_paged_reference, dtype),
        (attention_paged_reference, torch.float64),
    ):
        q, k_cache, v_cache, *tables = arguments
        # The float64 reference sees what rounding leaves in the caches.
        caches = [torch.empty_like(x).copy_(x) for x in (k_cache, v_cache)]
        if kind == torch.float64:
            attention_paged_reference(q, *caches, *tables, **options)
            held = tables[1] + (tables[2][1:] - tables[2][:-1])
            turns = ("cos", "sin", "interleaved", "k_new", "v_new")
            out, lse = attention_paged_reference(
                rotate_queries(q, tables, options).double(),
                *(x.double() for x in caches),
                tables[0],
                held,
                tables[2],
                **cast({k: v for k, v in options.items() if k not in turns}, torch.float64),
                return_lse=True,
            )
        else:
            given = options if f is attention_paged_ else cast_sinks(options, dtype)
            out, lse = f(q, *caches, *tables, **given, return_lse=True)
        results.append((out, lse, *caches))
    ours, native, truth = results
    assert_close(ours[0], native[0], truth[0], name="out")
    assert_close(ours[1], native[1].float(), truth[1], name="lse")
    for a, b in zip(ours[2:], native[2:], strict=True):
        assert_same_bits(a, b, "cache")


def cast_sinks(options, dtype):
    return {**options, "sinks": options["sinks"].to(dtype)} if "sinks" in options else options


def rotate_queries(q, tables, options):
    """q as the op rounds it after the turn: through the caches of a call that appends q itself."""
    if "cos" not in options:
        return q
    _, held, cu = tables
    most = int((held + cu[1:] - cu[:-1]).max())
    table = torch.arange(len(held), dtype=torch.int32, device=q.device)[:, None]
    cache = q.new_zeros(len(held), most, *q.shape[1:])
    turn = {k: options[k] for k in ("cos", "sin", "interleaved")}
    attention_paged_reference(q, cache, cache.clone(), table, held, cu, k_new=q, v_new=q, **turn)
    turned = q.clone()
    for b in range(len(held)):
        turned[cu[b] : cu[b + 1]] = cache[b, held[b] : held[b] + cu[b + 1] - cu[b]]
    return turned


def test_paged_decode_equals_prefill_bit_for_bit(device, dtype):
    tokens, dim = 45, 32
    q, k, v = (x[0] for x in inputs((1, tokens, tokens, 4, 2, dim), dtype, device))
    angles = torch.rand(tokens, dim // 2, device=device)
    turn = {"cos": angles.cos(), "sin": angles.sin()}
    table = torch.tensor([[3, 0, 5, 1, 2, 4]], dtype=torch.int32, device=device)

    def play(cuts):
        caches = [torch.full((6, 8, 2, dim), NAN, dtype=dtype, device=device) for _ in range(2)]
        parts = []
        for first, last in zip(cuts, cuts[1:], strict=False):
            held = torch.tensor([first], dtype=torch.int32, device=device)
            cu = torch.tensor([0, last - first], dtype=torch.int32, device=device)
            rows = slice(first, last)
            parts.append(
                attention_paged_(
                    q[rows], *caches, table, held, cu, k_new=k[rows], v_new=v[rows], **turn
                )
            )
        return torch.cat(parts)

    prefill = play([0, tokens])
    assert_same_bits(prefill, play([0, 7, 8, 30, tokens]))
    assert_same_bits(prefill, play(list(range(tokens + 1))))
    # The same as a dense pass over turned queries and keys.
    a, b = (x.float().chunk(2, -1) for x in (q, k))
    cos, sin = (x[:, None] for x in turn.values())
    turned = [
        torch.cat([x * cos - y * sin, y * cos + x * sin], -1).to(dtype)[None] for x, y in (a, b)
    ]
    assert_same_bits(prefill, attention(*turned, v[None])[0])


@pytest.mark.big
@pytest.mark.parametrize("dim", [40, 64, 128])
@pytest.mark.parametrize("heads", [(4, 1), (8, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("size", [7, 16])
def test_decode_equals_the_row_of_a_dense_pass(device, dtype, dim, heads, size, threads):
    """Whatever the head dim, the group, the block size and the cut into calls."""
    tokens = 600
    q, k, v = (x[0] for x in inputs((1, tokens, tokens, *heads, dim), dtype, device))
    dense, dense_lse = attention(q[None], k[None], v[None], return_lse=True)
    blocks = -(-tokens // size)
    table = torch.randperm(blocks).to(device)[None].int()
    caches = []
    for x in (k, v):
        cache = torch.full((blocks, size, heads[1], dim), NAN, dtype=dtype, device=device)
        at = torch.arange(tokens, device=device)
        cache[table[0, at // size].long(), at % size] = x
        caches.append(cache)
    for first, count in [(t, 1) for t in (0, 15, 16, 63, 64, 255, 256, 257, 511, 512, 599)] + [
        (0, 2),
        (254, 5),
        (300, 300),
    ]:
        threads(1 + first % 3)
        rows = slice(first, first + count)
        held = torch.tensor([first + count], dtype=torch.int32, device=device)
        cu = torch.tensor([0, count], dtype=torch.int32, device=device)
        out, lse = attention_paged_(q[rows], *caches, table, held, cu, return_lse=True)
        assert_same_bits(out, dense[0, rows], f"{first}, {count}")
        assert_same_bits(lse, dense_lse[0][:, rows], f"{first}, {count}")


def test_paged_without_new_keys_reads_only(device):
    arguments, _ = paged([9, 4], [2, 1], device=device)
    before = [x.clone() for x in arguments[1:3]]
    out = attention_paged_(*arguments)
    native = attention_paged_reference(*arguments)
    assert torch.allclose(out, native, atol=1e-6)
    for a, b in zip(before, arguments[1:3], strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
def test_paged_without_sequences(device, dtype):
    (q, *caches, table, held, _), new = paged([3], [2], dtype, device=device)
    cu = torch.zeros(1, dtype=torch.int32, device=device)
    angles = torch.ones(9, 16, device=device)
    for turn in ({}, {"cos": angles, "sin": angles}):
        empty = (q, *caches, table[:0], held[:0], cu)
        out, lse = attention_paged_(*empty, **new, **turn, return_lse=True)
        assert out.eq(0).all() and lse.eq(-torch.inf).all()


def test_opcheck_and_compile(device):
    ops = torch.ops.instructcore
    q, k, v = inputs((1, 5, 9, 4, 2, 16), device=device)
    plain = (9, True, 0.25, -1, -1, 0.0)
    checks = ("test_schema", "test_faketensor")
    sinks = torch.randn(4, device=device)
    torch.library.opcheck(
        ops.attention.default, (q, k, v, None, None, None, sinks, *plain), test_utils=checks
    )
    out, lse = ops.attention(q, k, v, None, None, None, sinks, *plain)
    saved = (q, k, v, out, lse, None, None, None, sinks)
    torch.library.opcheck(
        ops.attention_backward.default,
        (torch.randn_like(out), torch.randn_like(lse), *saved, *plain),
        test_utils=checks,
    )
    arguments, new = paged([5], [2], device=device)
    torch.library.opcheck(
        ops.attention_paged_.default,
        (*arguments, *new.values(), None, None, None, None, False, *plain[1:]),
        test_utils=checks,
    )

    cu = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    leaves = [x.requires_grad_() for x in inputs((1, 5, 5, 4, 2, 16), device=device)]

    def model(q, k, v):
        dense = attention(2 * q, k, v, window=(3, 0))
        return dense[0] + attention_varlen(q[0], k[0], v[0], cu, cu)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    a, b = compiled(*leaves), model(*leaves)
    assert_same_bits(a, b)
    for x, y in zip(
        torch.autograd.grad(a.sum(), leaves), torch.autograd.grad(b.sum(), leaves), strict=True
    ):
        assert_same_bits(x, y)


@pytest.mark.parametrize(
    "lengths", [(7, 30, 31, 64), pytest.param((7, 31, 300, 515), marks=pytest.mark.big)], ids=str
)
def test_compile_for_any_packed_length(device, lengths):
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    counter = aot_autograd(fw_compiler=counting)

    def step(q, k, v, cu, sinks):
        dense = attention(q[None], k[None], v[None], sinks=sinks)
        return dense[0] + attention_varlen(q, k, v, cu, cu, sinks=sinks)

    def longest(q, k, v, cu, _):
        return attention_varlen(q, k, v, cu, cu, max_seqlen_k=q.shape[0])

    for f in (step, longest):
        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
        graphs.clear()
        for n in lengths:
            cu = torch.tensor([0, n // 3, n], dtype=torch.int32, device=device)
            tensors = [x[0] for x in inputs((1, n, n, 4, 2, 16), device=device)]
            results = []
            for g in (compiled, f):
                sinks = torch.ones(4, device=device)
                leaves = [x.clone().requires_grad_() for x in (*tensors, sinks)]
                out = g(*leaves[:3], cu, leaves[3])
                out.square().sum().backward()
                results.append((out, *(x.grad for x in leaves if x.grad is not None)))
            for a, b in zip(*results, strict=True):
                assert_same_bits(a, b)
        assert len(graphs) <= 4, "forwards and backwards"


def test_double_backward(device, dtype):
    q, k, v = inputs((1, 5, 5, 2, 2, 16), dtype, device)
    sinks = torch.randn(2, device=device)

    def dense(q, k, v, sinks):
        out, lse = attention(q, k, v, sinks=sinks, return_lse=True)
        return out.float().square().sum() + lse.sum()

    def packed(q, k, v):
        cu = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
        return attention_varlen(q[0], k[0], v[0], cu, cu).sum()

    assert_differentiable_once("attention", dense, q, k, v, sinks)
    assert_differentiable_once("attention", packed, q, k, v)


def test_autocast(device):
    q, k, v = (x.requires_grad_() for x in inputs((1, 5, 5, 2, 2, 16), device=device))
    with torch.autocast(device, torch.bfloat16):
        out = attention(q, k, v)
    assert out.dtype == torch.bfloat16
    assert_same_bits(out, attention(*(x.bfloat16() for x in (q, k, v))))


def test_rejects(device, backend):
    q, k, v = inputs((2, 3, 4, 4, 2, 16), device=device)

    def call(q=q, k=k, v=v, **options):
        return attention(q, k, v, **options)

    with pytest.raises(TypeError, match="attention: q must be float32.*float64"):
        call(q.double())
    with pytest.raises(TypeError, match="attention: v must be torch.float32, got torch.bfloat16"):
        call(v=v.bfloat16())
    with pytest.raises(ValueError, match=r"attention: q must be \(B, tokens, heads, D\), got \(3,"):
        call(q[0])
    with pytest.raises(ValueError, match=r"attention: v must be \(2, 4, 2, 16\), got \(2, 3, 2"):
        call(v=v[:, :3])
    with pytest.raises(ValueError, match=r"attention: k must be \(2, 4, 2, 16\), got \(1, 4"):
        call(k=k[:1], v=v[:1])
    with pytest.raises(ValueError, match="attention: q's heads must be a multiple of k's"):
        call(q[:, :, :3])
    with pytest.raises(ValueError, match="attention: the head dim must be a multiple of 8 up to"):
        call(*(x[..., :12] for x in (q, k, v)))
    with pytest.raises(ValueError, match="attention: window must be"):
        call(window=(-1, 0))
    for bad in (3, 2.5, "ab", torch.tensor([1, 2], device=device)):
        with pytest.raises(TypeError, match=r"attention: window must be \(left, right\), .* got"):
            call(window=bad)
    for kind in (torch.int64, torch.float64):
        wrong = torch.ones(4, dtype=kind, device=device)
        with pytest.raises(TypeError, match="attention: sinks must be float32, bfloat16 or"):
            call(sinks=wrong)
        with pytest.raises(TypeError, match="attention: alibi_slopes must be torch.float32"):
            call(alibi_slopes=wrong)
    with pytest.raises(ValueError, match="attention: softcap must be 0"):
        call(softcap=-1.0)
    with pytest.raises(ValueError, match=r"attention: alibi_slopes must be \(4,\) or \(2, 4\)"):
        call(alibi_slopes=torch.rand(2, device=device))
    with pytest.raises(ValueError, match=r"attention: sinks must be \(4,\)"):
        call(sinks=torch.rand(2, device=device))
    with pytest.raises(ValueError, match=f"on {device}.*, got meta"):
        call(k=k.to("meta"))

    rows, cu = (q[0], k[0], v[0]), torch.tensor([0, 3], dtype=torch.int32, device=device)
    with pytest.raises(TypeError, match="attention_varlen: sinks must be float32, .* torch.int64"):
        attention_varlen(*rows, cu, cu, sinks=torch.ones(4, device=device).long())
    with pytest.raises(TypeError, match="attention_varlen: cu_seqlens_q must be torch.int32"):
        attention_varlen(*rows, cu.long(), cu.long())
    with pytest.raises(ValueError, match=r"attention_varlen: cu_seqlens_k must be \(2,\)"):
        attention_varlen(*rows, cu, cu[:1])
    if backend != "cpu":  # what follows is in device memory elsewhere
        return
    for bad in ([0, 4], [2, 1], [-1, 3]):
        cu = torch.tensor(bad, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="attention_varlen: cu_seqlens must"):
            attention_varlen(*rows, cu, cu)
    long = torch.randn(600, 2, 16, requires_grad=True)
    cu = torch.tensor([0, 600], dtype=torch.int32)
    out = attention_varlen(long, long, long, cu, cu, max_seqlen_k=5)
    with pytest.raises(RuntimeError, match="at most max_seqlen_k keys, got 600"):
        out.sum().backward()


def test_paged_rejects(device, backend):
    arguments, new = paged([9, 4], [2, 1], device=device)

    def call(at=None, value=None, **options):
        changed = list(arguments)
        if at is not None:
            changed[at] = value
        return attention_paged_(*changed, **{**new, **options})

    angles = torch.zeros(10, 16, device=device)
    with pytest.raises(ValueError, match="k_new and v_new must be given together"):
        call(v_new=None)
    with pytest.raises(ValueError, match="got no k_new"):
        call(k_new=None, v_new=None, cos=angles, sin=angles)
    with pytest.raises(TypeError, match="attention_paged_: sinks must be float32, .* torch.int64"):
        call(sinks=torch.ones(4, device=device).long())
    with pytest.raises(TypeError, match="attention_paged_: k_new must be torch.float32"):
        call(k_new=new["k_new"].bfloat16())
    with pytest.raises(ValueError, match="attention_paged_: q must be"):
        call(0, arguments[0][0])
    if backend != "cpu":
        return
    table, held = arguments[3], arguments[4]
    for bad in (-1, 1000):
        broken = table.clone()
        broken[0, 1] = bad
        with pytest.raises(
            RuntimeError, match=rf"block_table must be within .* got {bad} at \(0, 1"
        ):
            call(3, broken)
    with pytest.raises(RuntimeError, match="cache_seqlens must be 0 or more, got -1"):
        call(4, held - 10)
    with pytest.raises(RuntimeError, match="must fit block_table.* blocks"):
        call(4, held + 1000)
    with pytest.raises(RuntimeError, match="cos and sin must reach position 10, got 10 rows"):
        call(cos=angles, sin=angles)
