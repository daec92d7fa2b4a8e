"""Generation against transformers' generate: whole calls, prefill and all.

Ours draws at temperature 1 and returns log-probabilities; theirs takes the likeliest token and
returns none, the least that it can do. The shapes are Llama's: S has 16.9 million parameters, M
134, P 6.9. A case is sequences x (tokens of a prompt + new ones): sequences x new / time is
tokens/s.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import torch
from bench import Case

from instructcore.generate import Generator, SamplingParams
from instructcore.model import GPT, ModelConfig
from instructcore.tokenizer import Tokenizer

SHAPES = {
    "S": {"layers": 6, "width": 384, "heads": 6, "vocab_size": 8192, "tie_head": False},
    "M": {"layers": 12, "width": 768, "heads": 12, "vocab_size": 32000, "tie_head": False},
    "P": {"layers": 6, "width": 256, "heads": 4, "vocab_size": 8192},
}
CASES = (
    ("S", 1, 64, 64),
    ("S", 16, 64, 64),
    ("S", 64, 64, 64),
    ("M", 1, 64, 32),
    ("M", 16, 64, 32),
    ("P", 64, 32, 128),
)


def cases(device: str) -> Iterator[Case]:
    from transformers import AutoModelForCausalLM

    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for shape, sequences, prompt, new in CASES:
            model = GPT(ModelConfig(context=256, **SHAPES[shape]), dtype=dtype).to(device)
            with tempfile.TemporaryDirectory() as folder:
                model.save(folder)
                theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
            generator = Generator(model, Tokenizer.bytes(), prefill_tokens=sequences * prompt)
            each = [SamplingParams(new, seed=i, ignore_eos=True) for i in range(sequences)]
            exactly = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}

            def prompts(size=(sequences, prompt)):  # new ones, which no cache has seen
                return torch.randint(0, 256, size)

            def ours(generator=generator, prompts=prompts, each=each):
                return generator.generate(prompts().tolist(), each)

            def other(model=theirs, prompts=prompts, exactly=exactly):
                ids = prompts().to(device)
                mask = torch.ones_like(ids)
                return model.generate(ids, attention_mask=mask, pad_token_id=0, **exactly)

            # Every step reads every weight, but the embedding only where it is the head.
            weights = model.num_parameters() - model.embed.numel() * (not model.config.tie_head)
            yield Case(
                f"{shape} {sequences} x ({prompt} + {new})",
                name,
                "fwd",
                {"ours": ours, "transformers": other},
                bytes=float(new * weights * dtype.itemsize),
                flops=2.0 * weights * sequences * (prompt + new),
            )
