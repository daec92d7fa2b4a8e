"""linear, forward and backward, against torch's.

bytes: x, weight and y, each once; the backward also reads y's gradient and writes two more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from bench import Case

from instructcore.ops import linear

WEIGHTS = ((768, 256), (2048, 256), (3072, 768), (32000, 1024))  # N x K
ROWS = {torch.float32: (1, 16, 64, 256, 1024, 2048), torch.bfloat16: (1, 4, 16, 64, 512, 2048)}
TRAINED = (64, 512, 2048)


def gradients(f, x, weight, grad):
    return torch.autograd.grad(f(x, weight), (x, weight), grad)


def cases(device: str) -> Iterator[Case]:
    for dtype, many in ROWS.items():
        for columns, depth in WEIGHTS:
            weight = (torch.randn(columns, depth, device=device) / depth**0.5).to(dtype)
            for rows in many:
                x = torch.randn(rows, depth, device=device).to(dtype)
                numbers = rows * depth + columns * depth + rows * columns
                yield Case(
                    f"{rows} x {columns} x {depth}",
                    str(dtype).removeprefix("torch."),
                    "fwd",
                    {
                        "ours": lambda a=(x, weight): linear(*a),
                        "torch": lambda a=(x, weight): F.linear(*a),
                    },
                    bytes=numbers * x.element_size(),
                    flops=2.0 * rows * columns * depth,
                )
        for columns, depth in WEIGHTS[:3]:
            for rows in TRAINED:
                x = torch.randn(rows, depth, device=device).to(dtype).requires_grad_()
                weight = torch.randn(columns, depth, device=device).to(dtype).requires_grad_()
                grad = torch.randn(rows, columns, device=device).to(dtype)
                numbers = 2 * (rows * depth + columns * depth + rows * columns)
                yield Case(
                    f"{rows} x {columns} x {depth}",
                    str(dtype).removeprefix("torch."),
                    "fwd+bwd",
                    {
                        "ours": lambda a=(x, weight, grad): gradients(linear, *a),
                        "torch": lambda a=(x, weight, grad): gradients(F.linear, *a),
                    },
                    bytes=numbers * x.element_size(),
                    flops=6.0 * rows * columns * depth,
                )
