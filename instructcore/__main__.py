"""`python -m instructcore`: the command line; without arguments, what a bug report needs."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

DEPENDENCIES = (
    "numpy",
    "tokenizers",
    "safetensors",
    "rich",
    "matplotlib",
    "starlette",
    "uvicorn",
    "tensorboard",
    "transformers",
)


def report() -> str:
    """Versions, compiled back ends, the CPU's instruction sets, devices and driver, a line each."""
    import torch

    from . import __version__

    lines = {
        "instructcore": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads, "
        f"CUDA {torch.version.cuda or 'none'}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in DEPENDENCIES),
    }
    return "\n".join(f"{name:<13} {value}" for name, value in (lines | _back_ends()).items())


def _back_ends() -> dict[str, str]:
    try:
        from . import _C
    except ImportError as error:
        return {"back ends": f"none: {error}"}
    info = _C.build_info()
    cuda = "CUDA {}".format(_cuda_version(info["cuda_version"])) if info["cuda"] else "no CUDA"
    driver = _cuda_version(info["driver"]) if info["driver"] else "none"
    no_device = info["device_message"] if info["driver"] else "none"  # as "driver too old"
    return {
        "back ends": f"CPU, {cuda} (compiled by {info['compiler']})",
        "CPU ISA": f"{info['isa']} in use, {info['isa_supported']} supported",
        "CUDA devices": ", ".join(info["devices"]) or no_device or "none",
        "CUDA driver": driver,
    }


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        from .cli import main

        sys.exit(main())
    print(report())
