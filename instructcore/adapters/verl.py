"""verl (0.9): log-probabilities, the head fused with them, and generalized advantages."""

import torch

from instructcore.ops import gae, linear_token_logprobs, whiten_advantages

from . import head, refuse, replacing
from .trl import rows


def logprobs_from_logits(logits, labels, inplace_backward=True):
    """logits (..., V), labels (...) -> float32 (...). `inplace_backward` lets the gradient take
    the place of the logits; it never does."""
    return rows(logits, labels, 1.0, None, False).logprobs


def linear_cross_entropy(hidden, weight, labels, temperature=1.0, reduction="none",
                         dist_process_group=None):  # fmt: skip
    """hidden (..., C), weight (V, C), labels (...) -> (log-probabilities, entropies), (N,)."""
    op, reduced = "linear_cross_entropy", reduction if reduction.lower() != "none" else None
    refuse(op, reduction=(reduced, '"none"'))
    refuse(op, dist_process_group=(dist_process_group, "None, the vocabulary on one device"))
    hidden, weight, _ = head(hidden.reshape(-1, hidden.shape[-1]), weight, None)
    labels = labels.reshape(-1).long()
    return linear_token_logprobs(hidden, weight, labels, temperature=temperature)[:2]


def compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam):
    """All (B, T) -> (whitened advantages, returns), float32 (B, T), both 0 where response_mask is,
    where theirs hold what no loss looks at. ValueError for fewer than two unmasked tokens."""
    mask = response_mask.bool()
    advantages, returns = gae(token_level_rewards, values, mask, gamma=gamma, lambda_=lam)
    if (count := int(mask.sum())) < 2:
        raise ValueError(f"gae: whitening must have two unmasked tokens or more, got {count}")
    var, mean = torch.var_mean(advantages[mask])
    return whiten_advantages(advantages, mask, mean, var), returns


_homes = {
    "verl.utils.torch_functional": (logprobs_from_logits,),
    "verl.utils.kernel.linear_cross_entropy": (linear_cross_entropy,),
    "verl.trainer.ppo.core_algos": (compute_gae_advantage_return,),
}
use, restore = replacing(_homes)
