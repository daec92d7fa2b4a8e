"""TRL (1.x): log-probabilities of chosen tokens, and entropies, from one read of the logits; and
the language-model head fused with them, through which the trainers of TRL 1.16 train.

Results are float32, as those of TRL's own fused kernel.
"""

import torch

from instructcore.ops import TokenLogprobs, linear_token_logprobs, token_logprobs

from . import head, refuse, replacing


def rows(logits, index, temperature, row_mask, entropy) -> TokenLogprobs:
    """`token_logprobs` of logits (..., V) at index (...), of index's shape."""
    if index.shape != logits.shape[:-1]:
        raise ValueError(f"index must be {logits.shape[:-1]}, got {index.shape}")
    mask = None if row_mask is None else row_mask.reshape(-1) != 0
    how = {"temperature": temperature, "mask": mask, "entropy": entropy}
    found = token_logprobs(logits.reshape(-1, logits.shape[-1]), index.reshape(-1).long(), **how)
    return TokenLogprobs(*(x if x is None else x.view(index.shape) for x in found))


def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
    """logits (..., V), index and row_mask (...) or (..., K) -> float32, of index's shape, 0 where
    row_mask is. K tokens of a row take one read of it."""
    if index.ndim != logits.ndim:
        return rows(logits, index, temperature, row_mask, False).logprobs
    chosen = logits.gather(-1, index.long()).float() / temperature
    best = chosen.argmax(-1, keepdim=True)  # finite, if any is
    known = rows(logits, index.gather(-1, best)[..., 0], temperature, None, False).logprobs
    logprobs = chosen - chosen.gather(-1, best) + known[..., None]
    logprobs = torch.where(chosen.isneginf(), chosen, logprobs)
    return logprobs if row_mask is None else logprobs.masked_fill(row_mask == 0, 0.0)


def entropy_from_logits(logits, chunk_size=128):
    """logits (..., V) -> nats, float32 (...). `chunk_size` changes nothing: there is no copy."""
    return rows(logits, logits.new_zeros(logits.shape[:-1]), 1.0, None, True).entropy


def selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=True, temperature=1.0,
                                      row_mask=None):  # fmt: skip
    """logits (..., V), index and row_mask (...) -> (log-probabilities, entropies), float32."""
    found = rows(logits, index, temperature, row_mask, True)
    return found.logprobs, found.entropy if entropy_requires_grad else found.entropy.detach()


class ChunkedLogProbFunction:
    """`apply` stands in for that of TRL's autograd function of this name."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None,
              logit_scale=1.0,
              outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")):  # fmt: skip
        """hidden (N, C), weight (V, C), bias (V,), targets (N,) -> (log-probabilities, entropies,
        log of the sum of p^2, mean of the logits, whether the target is the argmax), None where
        `outputs` does not name it; no gradient through the last three. log_sum_sq_probs takes a
        second pass of the head, at half the temperature, and mean_logits a read of the weight.
        `chunk_size` changes nothing: `linear_token_logprobs` cuts as it does."""
        op = "ChunkedLogProbFunction"
        refuse(op, final_logit_softcapping=(final_logit_softcapping, "None"))
        refuse(op, logit_scale=(None if logit_scale > 0 else str(logit_scale), "above 0"))
        hidden, weight, bias = head(hidden, weight, bias)
        how, scale = {"bias": bias, "entropy": "entropy" in outputs}, temperature / logit_scale
        arguments, squares, mean = (hidden, weight, targets.long()), None, None
        found = linear_token_logprobs(*arguments, temperature=scale, **how)
        with torch.no_grad():
            if "log_sum_sq_probs" in outputs:
                how |= {"temperature": scale / 2, "entropy": False}
                squares = linear_token_logprobs(*arguments, **how).lse - 2 * found.lse
            if "mean_logits" in outputs:
                shift = 0.0 if bias is None else bias.float().mean()
                row = weight.mean(0, dtype=torch.float32)  # a product would be rounded by autocast
                mean = ((hidden * row).sum(-1) + shift) / scale
        top1 = found.top1 if "is_top1" in outputs else None
        return found.logprobs, found.entropy, squares, mean, top1


_ours = (selective_log_softmax, entropy_from_logits, selective_log_softmax_and_entropy)
_head = {"trl.kernels.chunked_logprob": (ChunkedLogProbFunction,)}  # from TRL 1.16 on
use, restore = replacing({"trl.trainer.utils": _ours, **_head})
