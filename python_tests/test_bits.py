"""One set of bits: a token's log-probability is the same number from trainer and generator.

`bench/bench_bits.py`, which has the ways to it, compares a million; here are enough to notice.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import pytest
import torch

from instructcore.generate import Generator
from instructcore.model import FAMILIES
from instructcore.scheduler import SamplingParams
from instructcore.tokenizer import Tokenizer

PROGRAM = Path(__file__).resolve().parents[1] / "bench" / "bench_bits.py"


@pytest.fixture(scope="module")
def bits():
    spec = importlib.util.spec_from_file_location("bench_bits", PROGRAM)
    module = sys.modules["bench_bits"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_gives_the_same_bits(bits, family, dtype):
    rng = random.Random(f"{family} {dtype}")
    model, compared = bits.random_model(family, dtype, rng), 0
    while compared < 5000:
        for way, ours, theirs in bits.compare(model, bits.random_texts(model, 12, rng), rng):
            assert bits.differing(ours, theirs) == 0, (way, model.config)
            compared += 0 if way == "rows" else ours.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_last_bit_of_one_weight_is_noticed(bits, dtype, monkeypatch):
    rng = random.Random(3)
    model = bits.random_model("llama", dtype, rng)
    texts = bits.random_texts(model, 12, rng)
    plain = [*bits.compare(model, texts, random.Random(0))]
    assert sum(bits.differing(ours, theirs) for _, ours, theirs in plain) == 0
    decode, weight = type(model).decode, model.blocks[0].down

    def nudged(self, *arguments):
        """The generator's weight is not quite the trainer's."""
        kept = weight.detach().clone()
        with torch.no_grad():
            value = weight[0, 0].to(dtype)
            weight[0, 0] = torch.nextafter(value, torch.full_like(value, torch.inf)).float()
            self._casts.clear()
            out = decode(self, *arguments)
            weight.copy_(kept)
        return out

    monkeypatch.setattr(type(model), "decode", nudged)
    found = {way for way, *pair in bits.compare(model, texts, rng) if bits.differing(*pair)}
    assert found == {"chunks", "rows", "scheduler", "prompts"}


def test_the_same_bytes_alone_in_a_crowd_and_after_a_restart(bits):
    """One request among 200, in any order of arrival, against itself on a fresh engine."""
    rng = random.Random(5)
    model = bits.random_model("qwen3", torch.bfloat16, rng)
    texts = [text[:60] for text in bits.random_texts(model, 200, rng)]
    each = [
        SamplingParams(max_tokens=rng.randint(1, 20), temperature=rng.choice((0.0, 1.0)), seed=i)
        for i in range(200)
    ]
    crowd = Generator(model, Tokenizer.bytes(), max_batch=48, prefill_tokens=100)
    done = crowd.generate(texts, each)
    order = rng.sample(range(200), 200)
    again = Generator(model, Tokenizer.bytes(), cache_bytes=1).generate(
        [texts[i] for i in order], [each[i] for i in order]
    )
    assert [done[i] for i in order] == again
    for i in rng.sample(range(200), 12):
        assert Generator(model, Tokenizer.bytes()).generate([texts[i]], each[i]) == [done[i]]
