"""Cut Cross-Entropy (25.6): the loss of the language-model head."""

import torch

from instructcore.ops import linear_cross_entropy as fused
from instructcore.ops.cross_entropy import reduction_index

from . import head, refuse, replacing


def chosen_logits(hidden, weight, bias, at):
    """The head's logit of token at[n] in row n, float32 (N,)."""
    logits = (hidden.float() * weight[at]).sum(-1)
    return logits if bias is None else logits + bias[at]


def capped(logits, softcap):
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def linear_cross_entropy(e, c, targets, bias=None, ignore_index=-100, softcap=None,
                         reduction="mean", shift=0, return_lse=False, filter_eps="auto",
                         accum_e_fp32=False, accum_c_fp32=False, filter_e_grad=True,
                         filter_c_grad=True, impl="cce", vocab_parallel_options=None):  # fmt: skip
    """e (..., C), c (V, C), targets (...) -> loss, or (loss, lse (...)), float32; with a shift,
    which cuts `shift` tokens off the last dim of (...), the loss of the tokens that come after.

    `filter_*`, `accum_*` and `impl` change nothing: no gradient is left out, and the sums are
    float32. lse is 0 where ignored; its gradient takes the rows of c at the targets.
    """
    must = "None, the vocabulary on one device"
    refuse("linear_cross_entropy", vocab_parallel_options=(vocab_parallel_options, must))
    if not 0 <= shift < targets.shape[-1]:
        must = f"in [0, {targets.shape[-1]})"
        raise ValueError(f"linear_cross_entropy: shift must be {must}, got {shift}")
    hidden = e[..., : targets.shape[-1] - shift, :].flatten(0, -2) if shift else e.flatten(0, -2)
    targets = targets[..., int(shift) :]
    hidden, c, bias = head(hidden, c, bias)
    flat, how = targets.flatten().long(), {"bias": bias, "ignore_index": ignore_index}
    how |= {"softcap": softcap or 0.0, "reduction": "none" if return_lse else reduction}
    loss = fused(hidden, c, flat, **how)
    if not return_lse:
        return loss.view(targets.shape) if reduction == "none" else loss
    valid = flat != ignore_index
    logits = capped(chosen_logits(hidden, c, bias, flat.where(valid, 0)), softcap)
    lse = (loss + logits).masked_fill(~valid, 0.0).view(targets.shape)
    if reduction_index("linear_cross_entropy", reduction) == 0:
        return loss.view(targets.shape), lse
    return loss.sum() / (valid.sum() if reduction == "mean" else 1), lse


use, restore = replacing({"cut_cross_entropy.linear_cross_entropy": (linear_cross_entropy,)})
