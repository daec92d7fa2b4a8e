"""TRL's GRPOTrainer teaches a small random Llama to count, without our kernels and with them.

    python examples/trl_grpo.py [--width 256 --layers 4 --vocab 32000 --length 128]

As trl_sft.py, whose lines it prints; besides, how far apart the rewards and the entropies are. Both
variants draw the same completions, unless rounding turns a draw. Two steps are made of each draw.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl_sft import arguments, compare, count, numbers


def counts_on(prompts: list[str], completions: list[str], **_) -> list[float]:
    """The share of neighbouring words of which the second is larger."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        words = [int(x) for x in f"{prompt.split()[-1]} {completion}".split() if x.isdigit()]
        right = [a < b for a, b in zip(words, words[1:], strict=False)]
        rewards.append(sum(right) / max(1, len(right)))
    return rewards


def grpo(args: argparse.Namespace, model: LlamaForCausalLM, **settings) -> GRPOTrainer:
    """Half of a step's completions are of one prompt, of 3 to 8 numbers."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(args.vocab, (64,), generator=generator).tolist()
    prompts = [count(start, 3 + i % 6, args.vocab) for i, start in enumerate(starts)]
    return GRPOTrainer(
        model,
        counts_on,
        GRPOConfig(
            max_steps=args.steps,
            max_completion_length=args.length,
            per_device_train_batch_size=args.batch,
            num_generations=args.batch // 2,
            num_iterations=2,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=numbers(args.vocab),
    )


def main(given: Sequence[str] | None = None) -> dict:
    args = arguments(given, batch=8, length=24, steps=8)
    return compare(args, grpo, ("loss", "reward", "entropy"))


if __name__ == "__main__":
    main()
