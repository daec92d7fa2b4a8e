"""The kernels as torch ops: functional, deterministic, on whatever device their tensors are."""

from __future__ import annotations

from .gae import gae, gae_reference

__all__ = ["gae", "gae_reference"]
