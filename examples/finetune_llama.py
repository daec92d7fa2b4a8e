"""A Llama of transformers learns to count, packed rows, without our kernels and with them.

    python examples/finetune_llama.py [STEPS]

Prints the losses of both, which differ by rounding alone, the time of a step, and the largest
amount of memory that torch held during one. The first step of each is left out of the times.
"""

from __future__ import annotations

import sys
import time

import torch
from torch.profiler import profile
from transformers import LlamaConfig, LlamaForCausalLM

from instructcore.adapters import transformers as ours

VOCAB = 2048
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LENGTHS = (100, 28, 300, 84)  # of the sequences in a row


def batch(step: int) -> dict[str, torch.Tensor]:
    """One row of sequences that count on from a number each; where positions start anew, so does
    a sequence, and nothing is to be learnt of its first token."""
    generator = torch.Generator().manual_seed(step)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    starts = torch.randint(VOCAB, (len(LENGTHS),), generator=generator)
    tokens = (positions + starts.repeat_interleave(torch.tensor(LENGTHS))) % VOCAB
    labels = tokens.masked_fill(positions == 0, -100)
    return {"input_ids": tokens, "position_ids": positions, "labels": labels}


def train(model: LlamaForCausalLM, steps: int) -> tuple[list[float], float, float]:
    """(losses, seconds a step, MiB that a step holds at most beyond what it begins with)."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, seconds = [], []

    def step(i: int) -> None:
        loss = model(**batch(i), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    for i in range(steps):
        begin = time.perf_counter()
        step(i)
        seconds.append(time.perf_counter() - begin)
    with profile(profile_memory=True) as profiled:
        step(steps)
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = torch.tensor([size for _, size in changes]).cumsum(0).max().item()
    return losses, sum(seconds[1:]) / max(1, steps - 1), held / 2**20


def main(steps: int = 20) -> list[list[float]]:
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=512, **SHAPE, **HEADS)
    found = []
    for kernels in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).train()
        if kernels:
            print(*ours.use(model), sep="\n")
        losses, seconds, memory = train(model, steps)
        if kernels:
            ours.restore(model)
        shown = (
            f"loss {losses[0]:.6f} .. {losses[-1]:.6f}  {1e3 * seconds:.1f} ms  {memory:.0f} MiB"
        )
        print(f"{'with' if kernels else 'without':8}{shown}")
        found.append(losses)
    apart = max(abs(a - b) for a, b in zip(*found, strict=True))
    print(f"the losses are {apart:.1e} apart at most")
    return found


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
