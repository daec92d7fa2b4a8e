"""instructcore: fused kernels for RLHF and, on top of them, a whole InstructGPT."""

from __future__ import annotations

__version__ = "0.1.0"
