"""sample against the warpers of transformers' generate and torch's multinomial."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench import Case

from instructcore.ops import sample

SETTINGS = {
    "plain": {"temperature": 0.8},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "greedy": {"temperature": 0.0},
}


def torch_sample(logits, temperature, top_k=0, top_p=1.0):
    """As transformers does it: filters, softmax, multinomial; and the two log-probabilities."""
    raw = logits.float().log_softmax(-1)
    if temperature == 0:
        tokens = raw.argmax(-1, keepdim=True)
        return tokens, raw.gather(-1, tokens), raw.gather(-1, tokens)
    z = logits.float() / temperature
    if top_k:
        z = z.masked_fill(z < z.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ordered, order = z.sort(descending=False)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[:, -1:] = False
        z = z.masked_fill(drop.scatter(1, order, drop), float("-inf"))
    probabilities = z.softmax(-1)
    tokens = torch.multinomial(probabilities, 1)
    return tokens, raw.gather(-1, tokens), probabilities.gather(-1, tokens).log()


compiled = torch.compile(torch_sample)


SHAPES = {
    "cpu": ((128, 1024), (16, 32000), (8, 151936)),
    "cuda": ((128, 151936), (512, 32000), (2048, 151936)),
}


def cases(device: str) -> Iterator[Case]:
    for rows, vocab in SHAPES[device]:
        logits = 3 * torch.randn(rows, vocab, device=device)
        positions = torch.arange(rows, device=device)
        for name, settings in SETTINGS.items():
            variants = {
                "ours": lambda x=logits, p=positions, s=settings: sample(
                    x, seeds=1, positions=p, **s
                ),
                "torch": lambda x=logits, s=settings: torch_sample(x, **s),
                "torch.compile": lambda x=logits, s=settings: compiled(x, **s),
            }
            # Every logit is read once.
            yield Case(
                f"{rows} x {vocab} {name}", "float32", "fwd", variants, bytes=4.0 * rows * vocab
            )
