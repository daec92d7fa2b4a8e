"""flash-attn (2.x): its attention functions, in float32 and on the CPU too.

Always deterministic, whatever `deterministic` says. Gradients flow through the returned lse too.
"""

import torch
import torch.nn.functional as F

from instructcore.ops import attention, attention_paged_, attention_varlen

from . import refuse, replacing


def _eights(*tensors):
    """Head dims filled up to a multiple of 8, as theirs are."""
    more = -tensors[0].shape[-1] % 8
    return [F.pad(x, (0, more)) for x in tensors] if more else tensors


def _settings(dim, causal, scale, window_size, softcap, alibi_slopes) -> dict:
    window = tuple(None if side < 0 else side for side in window_size)
    scale = dim**-0.5 if scale is None else scale
    settings = dict(causal=causal, scale=scale, window=window, softcap=softcap)
    return dict(**settings, alibi_slopes=alibi_slopes, return_lse=True)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                    softcap=0.0, alibi_slopes=None, deterministic=False,
                    return_attn_probs=False):  # fmt: skip
    """q (B, T, H, D), k and v (B, S, K, D) -> out, or (out, lse (B, H, T), empty): theirs has no
    probabilities without dropout either."""
    refuse("flash_attn_func", dropout_p=(dropout_p, "0, as the kernels have no dropout"))
    settings = _settings(q.shape[-1], causal, softmax_scale, window_size, softcap, alibi_slopes)
    out, lse = attention(*_eights(q, k, v), **settings)
    out = out[..., : q.shape[-1]]
    return (out, lse, out.new_empty(0)) if return_attn_probs else out


class _Paged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, *tensors):
        return attention_paged_(*tensors, **settings)

    @staticmethod
    def backward(ctx, *_):
        refuse("flash_attn_varlen_func", block_table=("one", "None where gradients are to flow"))


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                           dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                           softcap=0.0, alibi_slopes=None, deterministic=False,
                           return_attn_probs=False, block_table=None):  # fmt: skip
    """q (N, H, D), k and v (M, K, D), or paged (blocks, block_size, K, D), whose backward refuses
    -> out, or (out, lse (H, N), empty)."""
    refuse("flash_attn_varlen_func", dropout_p=(dropout_p, "0, as the kernels have no dropout"))
    settings = _settings(q.shape[-1], causal, softmax_scale, window_size, softcap, alibi_slopes)
    dim, (q, k, v) = q.shape[-1], _eights(q, k, v)
    if block_table is None:
        settings["max_seqlen_k"] = int(max_seqlen_k)
        out, lse = attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **settings)
    else:
        held = cu_seqlens_k.diff()
        out, lse = _Paged.apply(settings, q, k, v, block_table, held, cu_seqlens_q)
    return (out[..., :dim], lse, out.new_empty(0)) if return_attn_probs else out[..., :dim]


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None,
                            cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None,
                            block_table=None, softmax_scale=None, causal=False,
                            window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,
                            alibi_slopes=None, num_splits=0, return_softmax_lse=False):  # fmt: skip
    """q (B, T, H, D), caches (rows, S, K, D), or paged (blocks, block_size, K, D), MUTATED where
    there are k and v (B, T, K, D) -> out, or (out, lse (B, H, T)). `num_splits` changes no bit.
    rotary_cos (positions, D / 2) turns the whole head, or if interleaved as many dims as twice its
    columns; k is as long as q, or ValueError."""
    (batch, length, heads, _), op = q.shape, "flash_attn_with_kvcache"
    refuse(op, cache_leftpad=(cache_leftpad, "None: a cache begins at its first row"))
    same = length > 1 and not causal and tuple(window_size) == (-1, -1)  # position for all queries
    refuse(op, rotary_cos=(same and rotary_cos, "None for T > 1, unless causal or with a window"))
    like = {"dtype": torch.int32, "device": q.device}
    if block_table is None:  # a row of the cache is its block
        rows = torch.arange(batch, **like) if cache_batch_idx is None else cache_batch_idx.int()
        block_table = rows[:, None]
    held = torch.as_tensor(k_cache.shape[1] if cache_seqlens is None else cache_seqlens, **like)
    k, v = (None if x is None else x.flatten(0, 1) for x in (k, v))
    cos, sin = (None if x is None else x.float() for x in (rotary_cos, rotary_sin))
    rest = 0 if cos is None or sin is None else q.shape[-1] // 2 - cos.shape[1]
    if rotary_interleaved and rest > 0:  # by angles of 0
        cos, sin = F.pad(cos, (0, rest), value=1.0), F.pad(sin, (0, rest))
    cu_seqlens = torch.arange(0, batch * length + 1, length, **like)
    settings = _settings(q.shape[-1], causal, softmax_scale, window_size, softcap, alibi_slopes)
    settings |= dict(k_new=k, v_new=v, cos=cos, sin=sin, interleaved=rotary_interleaved)
    arguments = (q.flatten(0, 1), k_cache, v_cache, block_table, held.expand(batch), cu_seqlens)
    out, lse = attention_paged_(*arguments, **settings)
    out, lse = out.view(q.shape), lse.view(heads, batch, length).transpose(0, 1)
    return (out, lse) if return_softmax_lse else out


_ours = (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)
use, restore = replacing({"flash_attn.flash_attn_interface": _ours})
