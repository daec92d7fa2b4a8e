"""The kernels as torch ops: functional, deterministic, on whatever device their tensors are."""

from __future__ import annotations

from .activation import gelu, gelu_reference, swiglu, swiglu_reference
from .add_norm import add_norm, add_norm_reference
from .attention import (
    attention,
    attention_paged_,
    attention_paged_reference,
    attention_reference,
    attention_varlen,
    attention_varlen_reference,
)
from .cross_entropy import cross_entropy, cross_entropy_reference
from .gae import gae, gae_reference
from .linear import linear, linear_reference
from .linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from .linear_token_logprobs import linear_token_logprobs, linear_token_logprobs_reference
from .ppo_advantage import (
    PPOTargets,
    ppo_advantage,
    ppo_advantage_reference,
    whiten_advantages,
    whiten_advantages_reference,
)
from .ppo_loss import PPOStats, ppo_loss, ppo_loss_reference
from .rotary import rotary, rotary_reference
from .sample import Penalties, Sampled, sample, sample_reference
from .token_logprobs import TokenLogprobs, token_logprobs, token_logprobs_reference

__all__ = [
    "PPOStats",
    "PPOTargets",
    "Penalties",
    "Sampled",
    "TokenLogprobs",
    "add_norm",
    "add_norm_reference",
    "attention",
    "attention_paged_",
    "attention_paged_reference",
    "attention_reference",
    "attention_varlen",
    "attention_varlen_reference",
    "cross_entropy",
    "cross_entropy_reference",
    "gae",
    "gae_reference",
    "gelu",
    "gelu_reference",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "linear_reference",
    "linear_token_logprobs",
    "linear_token_logprobs_reference",
    "ppo_advantage",
    "ppo_advantage_reference",
    "ppo_loss",
    "ppo_loss_reference",
    "rotary",
    "rotary_reference",
    "sample",
    "sample_reference",
    "swiglu",
    "swiglu_reference",
    "token_logprobs",
    "token_logprobs_reference",
    "whiten_advantages",
    "whiten_advantages_reference",
]
