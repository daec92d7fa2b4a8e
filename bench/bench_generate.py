"""Generation against transformers' generate: whole calls, prefill and all; and decoding alone.

Ours draws at temperature 1 and returns log-probabilities; theirs takes the likeliest token and
returns none, the least that it can do. The shapes are Llama's: S has 16.9 million parameters, M
134, P 6.9. A case is sequences x (tokens of a prompt + new ones): sequences x new / time is
tokens/s. In `decode` the prompts have been fed before, untimed; a sum of the weights for each step
is what memory allows a single sequence.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator

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


class Pair:
    """A model of ours and the same one of transformers', and what both are asked to do."""

    def __init__(
        self, shape: str, sequences: int, prompt: int, new: int, dtype: torch.dtype, device: str
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.model = GPT(ModelConfig(context=256, **SHAPES[shape]), dtype=dtype).to(device)
        with tempfile.TemporaryDirectory() as folder:
            self.model.save(folder)
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.theirs = theirs.to(device).eval()
        limits = {"prefill_tokens": sequences * prompt}
        self.generator = Generator(self.model, Tokenizer.bytes(), **limits)
        self.size, self.new, self.device = (sequences, prompt), new, device
        self.name = f"{shape} {sequences} x ({prompt} + {new})"
        # Every step reads every weight, but the embedding only where it is the head.
        untied = not self.model.config.tie_head
        self.weights = self.model.num_parameters() - self.model.embed.numel() * untied

    def prompts(self) -> torch.Tensor:
        """New ones, which no cache has seen."""
        return torch.randint(0, 256, self.size)

    def params(self, new: int) -> list[SamplingParams]:
        return [SamplingParams(new, seed=i, ignore_eos=True) for i in range(self.size[0])]

    def whole(self) -> dict[str, Callable[[], object]]:
        each = self.params(self.new)
        exactly = {"max_new_tokens": self.new, "min_new_tokens": self.new, "do_sample": False}

        def theirs():
            ids = self.prompts().to(self.device)
            mask = torch.ones_like(ids)
            return self.theirs.generate(ids, attention_mask=mask, pad_token_id=0, **exactly)

        return {
            "ours": lambda: self.generator.generate(self.prompts().tolist(), each),
            "transformers": theirs,
        }

    def decoding(self) -> tuple[dict[str, Callable], dict[str, Callable]]:
        """(steps once the prompts are fed, what feeds them)"""
        scheduler, each, state = self.generator.scheduler, self.params(self.new + 1), {}
        self.frozen = self.model.frozen()
        self.frozen.__enter__()  # for as long as this lives, as a server does

        def feed():
            for prompt, params in zip(self.prompts().tolist(), each, strict=True):
                scheduler.add(prompt, params)
            scheduler.advance()

        @torch.inference_mode()
        def feed_theirs():
            state["out"] = self.theirs(self.prompts().to(self.device), use_cache=True)

        @torch.inference_mode()
        def theirs():
            warnings.simplefilter("ignore", FutureWarning)  # of new names for arguments
            for _ in range(self.new):
                ids = state["out"].logits[:, -1:].argmax(-1)
                past = state["out"].past_key_values
                state["out"] = self.theirs(ids, past_key_values=past, use_cache=True)

        read = [p.detach().to(self.model.compute_dtype) for p in self.model.parameters()]
        words = [p.view(torch.float32) for p in (read if self.model.unembed is None else read[1:])]
        variants = {
            "ours": lambda: [scheduler.advance() for _ in range(self.new)],
            "transformers": theirs,
            "floor: reading the weights": lambda: [
                word.sum() for _ in range(self.new) for word in words
            ],
        }
        return variants, {"ours": feed, "transformers": feed_theirs}


def cases(device: str) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        name, each = str(dtype).removeprefix("torch."), dtype.itemsize
        for shape in CASES:
            pair = Pair(*shape, dtype, device)
            (sequences, prompt), new = pair.size, pair.new
            counted = {"bytes": float(new * pair.weights * each)}
            counted["flops"] = 2.0 * pair.weights * sequences * (prompt + new)
            yield Case(pair.name, name, "fwd", pair.whole(), **counted)
            if shape[0] == "P":
                continue
            variants, setup = pair.decoding()
            counted["flops"] = 2.0 * pair.weights * sequences * new
            yield Case(f"decode {pair.name}", name, "fwd", variants, setup=setup, **counted)
