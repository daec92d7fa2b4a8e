"""instructcore: fused kernels for RLHF and, on top of them, a whole InstructGPT."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Imported when first asked for, so that `import instructcore` stays quick.
_EXPORTS = {
    "GPT": "model",
    "ModelConfig": "model",
    "load": "model",
    "Tokenizer": "tokenizer",
    "Generator": "generate",
    "SamplingParams": "generate",
    "score": "generate",
}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
