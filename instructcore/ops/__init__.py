"""The kernels as torch ops: functional, deterministic, on whatever device their tensors are."""

from __future__ import annotations

from .attention import (
    attention,
    attention_paged_,
    attention_paged_reference,
    attention_reference,
    attention_varlen,
    attention_varlen_reference,
)
from .gae import gae, gae_reference
from .ppo_advantage import (
    PPOTargets,
    ppo_advantage,
    ppo_advantage_reference,
    whiten_advantages,
    whiten_advantages_reference,
)
from .ppo_loss import PPOStats, ppo_loss, ppo_loss_reference

__all__ = [
    "PPOStats",
    "PPOTargets",
    "attention",
    "attention_paged_",
    "attention_paged_reference",
    "attention_reference",
    "attention_varlen",
    "attention_varlen_reference",
    "gae",
    "gae_reference",
    "ppo_advantage",
    "ppo_advantage_reference",
    "ppo_loss",
    "ppo_loss_reference",
    "whiten_advantages",
    "whiten_advantages_reference",
]
