"""transformers (5.x): attention "instructcore" and the loss of causal language models.

    lines = use(model)  # a model of transformers; the lines say what it did
    restore(model)

Once this module is imported, `attn_implementation="instructcore"` names the attention too.
"""

import weakref

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from instructcore.ops import attention, attention_varlen, cross_entropy

from . import once, refuse, replaced, undo


def attention_mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, *, mask_function,
                   attention_mask=None, use_vmap=False, device="cpu", **_):  # fmt: skip
    """Entry of transformers' AttentionMaskInterface: what `attention_forward` is told of the mask.

    int32 (B, keys): each key's sequence, counted from 1 in its row, 0 for padding; the queries are
    the last of the keys. None: one sequence in each row and no padding. A token begins a sequence
    where the mask function hides its predecessor: where packed position_ids start anew, or a chunk.

    Raises NotImplementedError for a mask that is not causal within such sequences.
    """
    keys = int(q_offset) + q_length - kv_offset  # what a static cache holds beyond them is empty
    row = torch.arange(batch_size, device=device)[:, None]
    at = torch.arange(kv_offset, kv_offset + keys, device=device)
    must = "causal, of transformers, with or without a window, chunks or packed sequences"
    refuse("attention_mask", mask_function=(use_vmap and "the caller's own", must))
    ahead = bool(torch.any(mask_function(row, 0, at[:-1], at[1:])))
    refuse("attention_mask", mask_function=(ahead and "one that shows later tokens", must))
    new = ~mask_function(row, 0, at[1:], at[:-1]).expand(batch_size, -1)
    sequence = F.pad(new.cumsum(1, dtype=torch.int32), (1, 0)) + 1
    if attention_mask is not None:
        beyond = kv_offset + keys - attention_mask.shape[1]
        real = F.pad(attention_mask.bool(), (-kv_offset, beyond))
        holes = torch.any((real > F.pad(real, (1, -1))).sum(1) > 1)
        wide = torch.all(mask_function(row, 0, at[-1:], at[:1]))
        must = "without padding between tokens where attention has a window or chunks"
        refuse("attention_mask", attention_mask=(bool(holes and not wide) and "some", must))
        sequence = torch.where(real, sequence, 0)
    return None if keys == kv_length and bool((sequence == 1).all()) else sequence


def _layout(sequence: torch.Tensor, length: int):
    """Of a mask and T: where queries lie in (B, T) and keys in (B, S), their cumulated lengths,
    and the longest of the keys'."""
    first = sequence.shape[1] - length
    row, at = sequence.nonzero(as_tuple=True)
    key = row * (sequence.shape[1] + 1) + sequence[row, at]
    _, which, keys = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
    queries = torch.bincount(which[at >= first], minlength=len(keys))
    cu_q, cu_k = (F.pad(n.cumsum(0, dtype=torch.int32), (1, 0)) for n in (queries, keys))
    longest = int(keys.max()) if len(keys) else 0
    return (row[at >= first], at[at >= first] - first), (row, at), cu_q, cu_k, longest


def attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None,
                      sliding_window=None, softcap=None, is_causal=None, s_aux=None,
                      **kwargs):  # fmt: skip
    """Entry of transformers' AttentionInterface: `attention`, or `attention_varlen` where there is
    padding or there are several sequences in a row.

    Args:
        query, key, value: (B, H, T, D) and (B, K, S, D).
        attention_mask: what `attention_mask` gave, or (B, S), True for tokens.
        kwargs: cu_seq_lens_q and cu_seq_lens_k, if given, tell the sequences in all rows, one
            after another, in place of the mask.

    Returns:
        (output (B, T, H, D), None). The output of padding is 0.
    """
    must = "0, as the kernels have none: set the model's attention dropout to 0"
    refuse("attention_forward", dropout=(dropout, must))
    for name in ("position_bias", "output_attentions", "block_table"):
        refuse("attention_forward", **{name: (kwargs.get(name), "None or False")})
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = None if sliding_window is None else (sliding_window - 1,) * 2
    how = dict(causal=causal, scale=scaling, window=window, softcap=softcap or 0.0, sinks=s_aux)
    cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if cu_q is not None and cu_k is not None:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        out = attention_varlen(q, k, v, cu_q.int(), cu_k.int(), **how)
        return out.unflatten(0, (len(query), -1)), None
    if attention_mask is None:
        return attention(*(x.transpose(1, 2) for x in (query, key, value)), **how), None
    shape = None if causal and attention_mask.ndim == 2 else tuple(attention_mask.shape)
    refuse("attention_forward", attention_mask=(shape, "(B, S), where attention is causal"))
    at, keys, *cu_seqlens, longest = _layout(attention_mask.int(), query.shape[2])
    q, k, v = (x[i, :, j] for x, (i, j) in ((query, at), (key, keys), (value, keys)))
    out = attention_varlen(q, k, v, *cu_seqlens, max_seqlen_k=longest, **how)
    return out.new_zeros(query.transpose(1, 2).shape).index_put(at, out), None


def causal_lm_loss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100,
                   shift_labels=None, **_):  # fmt: skip
    """`ForCausalLMLoss` by `cross_entropy`, without a float32 copy of the logits. Without a label
    the mean is 0."""
    if shift_labels is None:
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    targets = shift_labels.reshape(-1).to(logits.device)
    items, reduction = num_items_in_batch, "mean" if num_items_in_batch is None else "sum"
    how = {"ignore_index": ignore_index, "reduction": reduction}
    loss = cross_entropy(logits.reshape(-1, vocab_size), targets, **how)
    return loss if items is None else loss / torch.as_tensor(items, device=loss.device)


AttentionInterface.register("instructcore", attention_forward)
AttentionMaskInterface.register("instructcore", attention_mask)


def use(model: PreTrainedModel) -> list[str]:
    """Our attention, and our loss if it is a causal language model's, in this model; the lines of
    `report`. Called again, it changes nothing.

    Raises TypeError for what is no model of transformers, and ValueError for one that does not run
    with flash attention either or is made of several models.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"use: model must be a PreTrainedModel, got {name}")
    if not model._supports_flash_attn or model.config.sub_configs:
        raise ValueError(f"use: model must be of text and support flash attention, got {name}")
    this = weakref.ref(model, lambda gone: replaced.pop(gone, None))

    def change():
        old = this().config._attn_implementation
        this().set_attn_implementation("instructcore")
        lines = [f"{name}: attention {old} -> {__name__}.attention_forward"]
        if this().can_generate() and this().loss_function is ForCausalLMLoss:
            this().loss_function = causal_lm_loss
            lines.append(f"{name}: ForCausalLMLoss -> {__name__}.causal_lm_loss")
        return lines, lambda: _put_back(this(), old)

    return once(this, change)


def _put_back(model: PreTrainedModel, old: str) -> None:
    model.set_attn_implementation(old)
    if model.loss_function is causal_lm_loss:
        del model._loss_function


def restore(model: PreTrainedModel) -> None:
    """The model's own attention and loss again. ValueError without `use` before."""
    undo(weakref.ref(model))
