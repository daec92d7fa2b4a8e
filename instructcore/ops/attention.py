"""attention: fused softmax attention over dense, packed and paged keys and values."""

from __future__ import annotations

import threading
from functools import lru_cache

import torch
from torch import Tensor

from ._common import (
    _C,
    autocast_dtype,
    check_device,
    check_dtype,
    check_float,
    check_shape,
    differentiable_once,
    last_contiguous,
    register,
)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification, in the inputs' dtype. It lets NaN in hidden keys and values through."""
    (batch, length, heads, dim), keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    k, v = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (k, v))
    logits = torch.einsum("bthd,bshd->bhts", q, k) * (dim**-0.5 if scale is None else scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    query_at = torch.arange(length, device=q.device)[:, None] + keys - length
    distance = query_at - torch.arange(keys, device=q.device)
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.to(q.dtype).reshape(-1, heads, 1, 1) * distance.abs()
    left, right = window or (None, None)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        hidden |= distance < 0
    if left is not None:
        hidden |= distance > left
    if right is not None:
        hidden |= distance < -right
    logits = logits.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        sink = sinks.to(q.dtype).reshape(1, heads, 1, 1).expand(batch, heads, length, 1)
        logits = torch.cat([logits, sink], dim=-1)
    blind = (logits == -torch.inf).all(-1)  # rows without a key: keep NaN out of their gradients
    lse = torch.logsumexp(logits.masked_fill(blind[..., None], 0.0), dim=-1)
    weights = (logits - lse[..., None]).exp()[..., :keys]
    out = torch.einsum("bhts,bshd->bthd", weights, v)
    lse = torch.where(hidden.all(-1), lse.detach(), lse)  # no key, no gradient
    if not return_lse:
        return out
    return out, lse.masked_fill(blind, -torch.inf)


def attention_varlen_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification of `attention_varlen`: `attention_reference` on each sequence."""
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    heads = q.shape[1]
    outs, lses = (
        [q.new_zeros(ends_q[0], *q.shape[1:])],
        [q.new_full((heads, ends_q[0]), -torch.inf)],
    )
    for b in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        slopes = alibi_slopes
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[b]
        out, lse = attention_reference(
            q[None, rows],
            k[None, keys],
            v[None, keys],
            causal=causal,
            scale=scale,
            window=window,
            softcap=softcap,
            alibi_slopes=slopes,
            sinks=sinks,
            return_lse=True,
        )
        outs.append(out[0])
        lses.append(lse[0])
    outs.append(q.new_zeros(q.shape[0] - ends_q[-1], *q.shape[1:]))
    lses.append(q.new_full((heads, q.shape[0] - ends_q[-1]), -torch.inf))
    out, lse = torch.cat(outs), torch.cat(lses, dim=1)
    return (out, lse) if return_lse else out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (n, heads, D) turned by angles given as cos and sin (n, D / 2), rounded to x's dtype."""
    cos, sin = cos[:, None], sin[:, None]
    y = x.to(torch.promote_types(x.dtype, cos.dtype))
    if interleaved:
        a, b = y[..., ::2], y[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = y.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return turned.to(x.dtype)


@torch.no_grad()
def attention_paged_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification of `attention_paged_`; it too appends to the caches."""
    size = k_cache.shape[1]
    ends = cu_seqlens_q.tolist()
    out, lse = torch.zeros_like(q), q.new_full((q.shape[1], q.shape[0]), -torch.inf)
    for b, held in enumerate(cache_seqlens.tolist()):
        rows = slice(ends[b], ends[b + 1])
        count = ends[b + 1] - ends[b]
        queries, total = q[rows], held
        if cos is not None:
            angles = cos[held : held + count], sin[held : held + count]
            queries = _rotate(queries, *angles, interleaved)
        if k_new is not None:
            total += count
            at = torch.arange(held, total, device=q.device)
            block = block_table[b, at // size].long()
            keys = k_new[rows] if cos is None else _rotate(k_new[rows], *angles, interleaved)
            k_cache[block, at % size] = keys.to(k_cache.dtype)
            v_cache[block, at % size] = v_new[rows].to(v_cache.dtype)
        blocks = block_table[b, : -(-total // size)].long()
        slopes = alibi_slopes
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[b]
        row_out, row_lse = attention_reference(
            queries[None],
            k_cache[blocks].flatten(0, 1)[None, :total].to(q.dtype),
            v_cache[blocks].flatten(0, 1)[None, :total].to(q.dtype),
            causal=causal,
            scale=scale,
            window=window,
            softcap=softcap,
            alibi_slopes=slopes,
            sinks=sinks,
            return_lse=True,
        )
        out[rows], lse[:, rows] = row_out[0], row_lse[0]
    return (out, lse) if return_lse else out


MAX_DIM = 256
Window = tuple[int | None, int | None] | None


@lru_cache
def _plan(dim: int) -> tuple[int, int, int, int, int]:
    """Floats of scratch per thread (forward, backward), keys and query rows of a backward block,
    and the padded head dim."""
    return _C.attention_plan(dim)


def _check_heads(
    op: str, q: Tensor, k: Tensor, slopes: Tensor | None, sinks: Tensor | None, batch: int
):
    heads, dim, kv_heads = q.shape[-2], q.shape[-1], k.shape[-2]
    if dim % 8 or not 0 < dim <= MAX_DIM:
        raise ValueError(f"{op}: the head dim must be a multiple of 8 up to {MAX_DIM}, got {dim}")
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: q's heads must be a multiple of k's, got {heads} and {kv_heads}")
    check_dtype(op, torch.float32, alibi_slopes=slopes, sinks=sinks)
    if slopes is not None and slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"{op}: alibi_slopes must be ({heads},) or ({batch}, {heads}), "
            f"got {tuple(slopes.shape)}"
        )
    check_shape(op, (heads,), sinks=sinks)


def _allocate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    packed = cu_seqlens_q is not None
    op, ndim = ("attention_varlen", 3) if packed else ("attention", 4)
    check_float(op, q=q)
    check_dtype(op, q.dtype, k=k, v=v)
    check_dtype(op, torch.int32, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    for name, x in (("q", q), ("k", k)):
        if x.ndim != ndim:
            layout = "(N, heads, D)" if packed else "(B, tokens, heads, D)"
            raise ValueError(f"{op}: {name} must be {layout}, got {tuple(x.shape)}")
    check_shape(op, (*k.shape[:-1], q.shape[-1]), k=k)
    check_shape(op, k.shape, v=v)
    if packed:
        if cu_seqlens_q.ndim != 1 or cu_seqlens_q.shape[0] < 1:
            raise ValueError(
                f"{op}: cu_seqlens_q must be (B + 1,), got {tuple(cu_seqlens_q.shape)}"
            )
        check_shape(op, cu_seqlens_q.shape, cu_seqlens_k=cu_seqlens_k)  # None: as the queries'
        batch, lse_shape = cu_seqlens_q.shape[0] - 1, (q.shape[1], q.shape[0])
    else:
        batch, lse_shape = q.shape[0], (q.shape[0], q.shape[2], q.shape[1])
        check_shape(op, (batch, *k.shape[1:]), k=k)
    _check_heads(op, q, k, alibi_slopes, sinks, batch)
    check_device(
        op,
        q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


class _Scratch(threading.local):
    """The calling thread's workspace, kept: fresh pages would cost more than a short call."""

    tensor = torch.empty(0, device="cpu")

    def take(self, floats: int) -> tuple[Tensor, int]:
        """(workspace, threads) for `floats` per thread and a flag each."""
        threads = torch.get_num_threads()
        if self.tensor.numel() < threads * (floats + 1):
            size = threads * (floats + 1)
            self.tensor = torch.empty(size, dtype=torch.float32, device="cpu")
        return self.tensor, threads


_scratch = _Scratch()


def _workspace(q: Tensor, k: Tensor, table: Tensor | None, backward: bool) -> tuple[Tensor, int]:
    """(workspace, threads) of a call: on CUDA a tensor of its own, on the CPU the thread's."""
    if floats := _C.attention_workspace(q, k, table, backward):
        return q.new_empty(floats, dtype=torch.float32), 0
    return _scratch.take(_plan(q.shape[-1])[1 if backward else 0])


def _plain(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _run(q, k, v, cu_q, cu_k, slopes, sinks, max_seqlen_k, *settings):
    out, lse = _allocate(q, k, v, cu_q, cu_k, slopes, sinks, max_seqlen_k, *settings)
    workspace, threads = _workspace(q, k, None, False)
    _C.attention(
        *(last_contiguous(x) for x in (q, k, v)),
        *(_plain(x) for x in (cu_q, cu_q if cu_k is None else cu_k, slopes, sinks)),
        out,
        lse,
        workspace,
        *settings,
        threads,
    )
    return out, lse


def _allocate_backward(
    grad_out, grad_lse, q, k, v, out, lse, cu_q, cu_k, slopes, sinks, max_seqlen_k, *settings
):
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(0 if sinks is None else q.shape[-2], dtype=torch.float32),
    )


def _run_backward(
    grad_out, grad_lse, q, k, v, out, lse, cu_q, cu_k, slopes, sinks, max_seqlen_k, *settings
):
    grad_q, grad_k, grad_v, grad_sinks = _allocate_backward(
        grad_out, grad_lse, q, k, v, out, lse, cu_q, cu_k, slopes, sinks, max_seqlen_k
    )
    _, _, keys, rows, padded = _plan(q.shape[-1])
    workspace, threads = _workspace(q, k, None, True)
    heads, kv_heads = q.shape[-2], k.shape[-2]
    tokens, batch = lse.numel() // heads, (q.shape[0] if cu_q is None else cu_q.shape[0] - 1)
    sums = turns = None
    if threads and max_seqlen_k > keys:  # several tasks add to the same queries
        sums = q.new_empty(tokens * heads * padded, dtype=torch.float32)
        count = kv_heads * (tokens * (heads // kv_heads) // rows + batch + 1)
        turns = q.new_zeros(count, dtype=torch.int32)
    _C.attention_backward(
        *(last_contiguous(x) for x in (q, k, v)),
        *(_plain(x) for x in (cu_q, cu_q if cu_k is None else cu_k, slopes, sinks)),
        out,
        lse,
        last_contiguous(grad_out),
        _plain(grad_lse),
        grad_q,
        grad_k,
        grad_v,
        None if sinks is None else grad_sinks,
        workspace,
        sums,
        turns,
        *settings,
        threads,
    )
    return grad_q, grad_k, grad_v, grad_sinks


_SETTINGS = "bool causal, float scale, int left, int right, float softcap"
_attention = register(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    f"Tensor? alibi_slopes, Tensor? sinks, SymInt max_seqlen_k, {_SETTINGS}) -> (Tensor, Tensor)",
    _allocate,
    _run,
    devices=("cpu", "cuda"),
)
_attention_backward = register(
    "attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? sinks, "
    f"SymInt max_seqlen_k, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _allocate_backward,
    _run_backward,
    devices=("cpu", "cuda"),
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, cu_q, cu_k, slopes, settings):
        out, lse = _attention(q, k, v, cu_q, cu_k, slopes, sinks, *settings)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, slopes, sinks)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @differentiable_once("attention")
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, cu_q, cu_k, slopes, sinks = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grad_q, grad_k, grad_v, grad_sinks = _attention_backward(
            *(grad_out, grad_lse, q, k, v, out, lse, cu_q, cu_k, slopes, sinks, *ctx.settings)
        )
        return grad_q, grad_k, grad_v, None if sinks is None else grad_sinks, *[None] * 4


def _settings(
    op: str, dim: int, causal: bool, scale: float | None, window: Window, softcap: float
) -> tuple[bool, float, int, int, float]:
    """(causal, scale, left, right, softcap) as the ops take them: an unbounded side is -1."""
    if window is not None and not isinstance(window, tuple | list):
        raise TypeError(f"{op}: window must be (left, right), each None or 0 and up, got {window}")
    sides = (None, None) if window is None else tuple(window)
    if len(sides) != 2 or any(side is not None and side < 0 for side in sides):
        raise ValueError(f"{op}: window must be (left, right), each None or 0 and up, got {window}")
    if not softcap >= 0.0:
        raise ValueError(f"{op}: softcap must be 0 (off) or positive, got {softcap}")
    left, right = (-1 if side is None else int(side) for side in sides)
    scale = max(dim, 1) ** -0.5 if scale is None else float(scale)
    return bool(causal), scale, left, right, float(softcap)


def _float_sinks(op: str, sinks: Tensor | None) -> Tensor | None:
    check_float(op, sinks=sinks)
    return None if sinks is None else sinks.to(torch.float32)


def _dispatch(q, k, v, cu_q, cu_k, slopes, sinks, settings, return_lse):
    if dtype := autocast_dtype(q):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    sinks = _float_sinks("attention" if cu_q is None else "attention_varlen", sinks)
    if cu_k is cu_q:  # torch.compile takes no tensor twice
        cu_k = None
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
        out, lse = _Attention.apply(q, k, v, sinks, cu_q, cu_k, slopes, settings)
    else:
        out, lse = _attention(q, k, v, cu_q, cu_k, slopes, sinks, *settings)
    return (out, lse) if return_lse else out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: Window = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention with grouped heads, causal or not, in one pass over the keys.

    For query t (0 <= t < T), key s (0 <= s < S) and the distance d = t + S - T - s::

        logit[t, s] = cap(scale q[t] . k[s]) - slope |d|,   cap(x) = softcap tanh(x / softcap)
        t sees s where -right <= d <= left; with causal also 0 <= d
        lse[t] = log(sum over seen s of exp(logit[t, s]) + exp(sink))
        out[t] = sum over seen s of exp(logit[t, s] - lse[t]) v[s]

    So the last query is aligned with the last key. Query head h reads key/value head h K / H.

    Args:
        q: (B, T, H, D); D a multiple of 8 up to 256. Any strides but the last, which is 1 (a copy
            is made otherwise).
        k, v: (B, S, K, D) of q's dtype; H a multiple of K.
        causal: hide keys to the right of the diagonal.
        scale: D ** -0.5 if None.
        window: (left, right) keys besides the diagonal one, inclusive; None is unbounded.
        softcap: 0 is off; 20..50 where models use it.
        alibi_slopes: float32 (H,) or (B, H).
        sinks: (H,): a logit per head that takes weight and gives nothing.
        return_lse: also return lse.

    Returns:
        out (B, T, H, D) in q's dtype; with return_lse (out, lse), lse float32 (B, H, T), natural
        log. A query that sees no key: out 0, lse the sink or -inf, no gradient.

    Raises:
        TypeError: an element type is not the documented one.
        ValueError: shapes, devices or settings do not fit.

    Gradients for q, k, v and sinks, through out and lse; differentiable once.

    Numerics: float32 arithmetic whatever the input type. A query's bits depend on its own keys
    alone: the same in any batch, for any cut into calls and any number of threads. NaN or infinity
    that a query does not see does not reach it. Under autocast q, k and v are cast to its dtype.

    Source: Dao et al. 2022, arXiv:2205.14135.
    """
    settings = _settings("attention", q.shape[-1], causal, scale, window, softcap)
    settings = (k.shape[1] if k.ndim == 4 else 0, *settings)
    return _dispatch(q, k, v, None, None, alibi_slopes, sinks, settings, return_lse)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: Window = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` on sequences packed one after another, without padding.

    Args:
        q: (N, H, D): the queries of all sequences.
        k, v: (M, K, D): their keys and values.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,): sequence b is q[cu_seqlens_q[b]:
            cu_seqlens_q[b + 1]] and so on. Sequences may be empty; rows of no sequence give 0.
        max_seqlen_q, max_seqlen_k: the longest sequences, if known; they save memory in the
            backward.
        alibi_slopes: float32 (H,) or (B, H).
        causal, scale, window, softcap, sinks, return_lse: as for `attention`, in each sequence.

    Returns:
        out (N, H, D) in q's dtype; with return_lse (out, lse), lse float32 (H, N).

    Raises:
        TypeError, ValueError: as `attention`.
        RuntimeError: cu_seqlens decreases or leaves its tensor (checked on the CPU only).

    Numerics: as `attention`, bit for bit, on each sequence alone.

    Source: Dao et al. 2022, arXiv:2205.14135.
    """
    settings = _settings("attention_varlen", q.shape[-1], causal, scale, window, softcap)
    settings = (k.shape[0] if max_seqlen_k is None else max_seqlen_k, *settings)
    return _dispatch(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, settings, return_lse)


def _allocate_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    interleaved: bool,
    causal: bool,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    op = "attention_paged_"
    check_float(op, q=q, k_cache=k_cache)
    check_dtype(op, k_cache.dtype, v_cache=v_cache)
    check_dtype(op, q.dtype, k_new=k_new, v_new=v_new)
    check_dtype(op, torch.float32, cos=cos, sin=sin)
    check_dtype(
        op,
        torch.int32,
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        cu_seqlens_q=cu_seqlens_q,
    )
    if q.ndim != 3:
        raise ValueError(f"{op}: q must be (N, H, D), got {tuple(q.shape)}")
    if k_cache.ndim != 4 or k_cache.shape[3] != q.shape[2]:
        raise ValueError(
            f"{op}: k_cache must be (blocks, block_size, K, {q.shape[2]}), "
            f"got {tuple(k_cache.shape)}"
        )
    check_shape(op, k_cache.shape, v_cache=v_cache)
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError(f"{op}: the caches' last stride must be 1, got {k_cache.stride()}")
    if cache_seqlens.ndim != 1 or block_table.ndim != 2:
        raise ValueError(
            f"{op}: cache_seqlens must be (B,) and block_table (B, blocks), "
            f"got {tuple(cache_seqlens.shape)} and {tuple(block_table.shape)}"
        )
    batch = cache_seqlens.shape[0]
    check_shape(op, (batch, block_table.shape[1]), block_table=block_table)
    check_shape(op, (batch + 1,), cu_seqlens_q=cu_seqlens_q)
    check_shape(op, (q.shape[0], *k_cache.shape[2:]), k_new=k_new, v_new=v_new)
    for first, second, names in ((k_new, v_new, "k_new and v_new"), (cos, sin, "cos and sin")):
        if (first is None) != (second is None):
            raise ValueError(f"{op}: {names} must be given together, got one")
    if cos is not None:
        if k_new is None:
            raise ValueError(f"{op}: cos and sin turn q and k_new, got no k_new")
        check_shape(op, (cos.shape[0], q.shape[2] // 2), cos=cos, sin=sin)
    _check_heads(op, q, k_cache, alibi_slopes, sinks, batch)
    check_device(
        op,
        q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        cu_seqlens_q=cu_seqlens_q,
        k_new=k_new,
        v_new=v_new,
        cos=cos,
        sin=sin,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _run_paged(
    q, k_cache, v_cache, table, held, cu_q, k_new, v_new, cos, sin, slopes, sinks, *settings
):
    out, lse = _allocate_paged(
        q, k_cache, v_cache, table, held, cu_q, k_new, v_new, cos, sin, slopes, sinks, *settings
    )
    workspace, threads = _workspace(q, k_cache, table, False)
    _C.attention_paged(
        last_contiguous(q),
        k_cache,
        v_cache,
        *(_plain(x) for x in (table, held, cu_q)),
        *(None if x is None else last_contiguous(x) for x in (k_new, v_new)),
        *(_plain(x) for x in (cos, sin, slopes, sinks)),
        out,
        lse,
        workspace,
        *settings,
        threads,
    )
    return out, lse


_attention_paged = register(
    "attention_paged_",
    "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_table, Tensor cache_seqlens, "
    "Tensor cu_seqlens_q, Tensor? k_new, Tensor? v_new, Tensor? cos, Tensor? sin, "
    f"Tensor? alibi_slopes, Tensor? sinks, bool interleaved, {_SETTINGS}) -> (Tensor, Tensor)",
    _allocate_paged,
    _run_paged,
    devices=("cpu", "cuda"),
)


@torch.no_grad()
def attention_paged_(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    causal: bool = True,
    scale: float | None = None,
    window: Window = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append to a paged key/value cache and attend to it; prefill and decode mix in one call.

    Sequence b holds cache_seqlens[b] tokens, the j-th in row j % block_size of block
    block_table[b, j // block_size]. Its T_b new tokens are appended, then its T_b queries attend as
    in `attention` with S = cache_seqlens[b] + T_b (without k_new: S = cache_seqlens[b]). With cos
    and sin, q[i] and k_new[i] of a sequence are first turned by the angles of position
    cache_seqlens[b] + i, i from 0, and rounded to their dtype::

        (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)

    `cache_seqlens` itself is left to the caller.

    Args:
        q: (N, H, D), the queries of all sequences.
        k_cache, v_cache: (blocks, block_size, K, D), float32, bfloat16 or float16. MUTATED.
        block_table: int32 (B, max_blocks); -1 where unused.
        cache_seqlens: int32 (B,): tokens held before the append.
        cu_seqlens_q: int32 (B + 1,): sequence b's queries are q[cu_seqlens_q[b]:
            cu_seqlens_q[b + 1]].
        k_new, v_new: (N, K, D) of q's dtype; they are read as rounded to the cache's dtype.
        cos, sin: float32 (positions, D / 2).
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + D / 2).
        causal, scale, window, softcap, alibi_slopes, sinks, return_lse: as for `attention`.

    Returns:
        out (N, H, D) in q's dtype; with return_lse (out, lse), lse float32 (H, N). No gradient.

    Raises:
        TypeError, ValueError: as `attention`.
        RuntimeError: a length, block or position is out of range (checked on the CPU only).

    Numerics: as `attention`, bit for bit, on the same keys laid out densely.

    Source: Kwon et al. 2023, arXiv:2309.06180.
    """
    settings = _settings("attention_paged_", q.shape[-1], causal, scale, window, softcap)
    sinks = _float_sinks("attention_paged_", sinks)
    out, lse = _attention_paged(
        *(q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, k_new, v_new),
        *(cos, sin, alibi_slopes, sinks, interleaved, *settings),
    )
    return (out, lse) if return_lse else out
