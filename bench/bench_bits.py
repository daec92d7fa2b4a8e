"""One set of bits: the trainer's log-probabilities against the generator's, as integers.

    python bench/bench_bits.py   # a million, on 24 random models
    python bench/bench_bits.py --models 3 --seed 7
    python bench/bench_bits.py --record   # the outcome goes to bench/results/bits.md, too

The truth is the trainer's forward over one text alone. Every other way to the same number must give
its very bits, in float32 and in bfloat16:

    packed      the texts in one forward, in any order, on one thread or several
    trained     that forward under autograd, as PPO's loss runs it, at the rollouts' temperature
    chunks      a paged decode, each text in random pieces, up to 64 texts in a step
    rows        the same, whole rows of the vocabulary instead of one log-probability
    scheduler   what sampling returned: batches of 1 to 64, chunked prefill, forks, cache hits and
                preemptions; at temperature 1 and at others
    prompts     the log-probabilities of prompts that it returned

Prints how many were compared and how many differ; the exit status is 1 if any does.
"""

from __future__ import annotations

import argparse
import datetime
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from bench import commit, device_name

from instructcore import ops
from instructcore.generate import Generator, score
from instructcore.model import FAMILIES, GPT, KVCache, ModelConfig
from instructcore.scheduler import SamplingParams
from instructcore.tokenizer import Tokenizer

Pair = tuple[str, Tensor, Tensor]  # way, what it gave, the truth


def random_model(family: str, dtype: torch.dtype, rng: random.Random) -> GPT:
    """Any shape, every weight random, so that logits spread and each token depends on the past."""
    dim, kv_heads = 8 * rng.randint(1, 8), rng.choice((1, 2, 3))
    heads = kv_heads if family == "gpt2" else kv_heads * rng.choice((1, 2, 4))
    config = ModelConfig(
        family=family,
        vocab_size=rng.randint(259, 1200),
        context=160,
        layers=rng.randint(1, 3),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        width=heads * dim if family == "gpt2" else heads * rng.choice((16, 24, 40)),
        mlp_width=rng.randint(30, 400),
        tie_head=rng.random() < 0.5,
    )
    model = GPT(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(rng.randrange(1 << 40))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=1 / parameter.shape[-1] ** 0.5)
    return model


def random_texts(model: GPT, count: int, rng: random.Random) -> list[list[int]]:
    """Texts of all lengths, some of which begin alike."""
    vocab, longest = model.config.vocab_size, model.config.context
    stems = [[rng.randrange(vocab) for _ in range(longest)] for _ in range(1 + count // 3)]
    texts = []
    for _ in range(count):
        stem = rng.choice(stems)[: rng.choice((0, 1, 16, rng.randint(0, 100)))]
        rest = rng.randint(2, 60 if rng.random() < 0.8 else longest - len(stem))
        texts.append(stem + [rng.randrange(vocab) for _ in range(rest)])
    return texts


def pack(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, cu_seqlens, targets), the last of each text without a target."""
    lengths = torch.tensor([0, *map(len, texts)])
    tokens = torch.tensor([id for text in texts for id in text])
    targets = tokens.roll(-1)
    targets[lengths.cumsum(0)[1:] - 1] = -100
    return tokens, lengths.cumsum(0).int(), targets


def trained(model: GPT, texts: Sequence[Sequence[int]], temperature: float) -> list[Tensor]:
    """The log-probabilities that a loss is made of."""
    tokens, starts, targets = pack(texts)
    with torch.enable_grad():
        found = ops.linear_token_logprobs(
            model.hidden(tokens, starts), model.head_weight, targets, temperature=temperature
        )
    return [row[:-1] for row in found.logprobs.detach().split([*map(len, texts)])]


@torch.no_grad()
def decoded(model: GPT, texts: Sequence[Sequence[int]], rng: random.Random) -> list[Tensor]:
    """Hidden states by paged decoding, in pieces of random length."""
    size, longest = rng.choice((1, 5, 16, 32)), model.config.context
    per_row = -(-longest // size)
    cache = KVCache(model, len(texts) * per_row, size, len(texts), per_row)
    pages = torch.randperm(len(texts) * per_row).int()
    table, held = pages.view(len(texts), per_row), torch.zeros(len(texts), dtype=torch.int32)
    hidden: list[list[Tensor]] = [[] for _ in texts]
    most = rng.choice((1, 7, 40, longest))
    while active := [i for i, text in enumerate(texts) if held[i] < len(text)]:
        rng.shuffle(active)
        active = active[: rng.randint(1, len(active))]
        parts = [texts[i][held[i] : held[i] + rng.randint(1, most)] for i in active]
        tokens, starts, _ = pack(parts)
        cache.block_table, cache.seqlens = table[active], held[active]
        out = model.decode(tokens, starts, cache).split([*map(len, parts)])
        for i, rows in zip(active, out, strict=True):
            hidden[i].append(rows)
        held[active] = cache.seqlens
    return [torch.cat(rows) for rows in hidden]


def sampled(model: GPT, texts: Sequence[Sequence[int]], rng: random.Random) -> Iterator[Pair]:
    """Random requests on a scheduler with little memory."""
    limits = {
        "max_batch": rng.choice((1, 7, 24, 64)),
        "prefill_tokens": rng.choice((3, 33, 512)),
        "block_size": rng.choice((4, 16)),
        "cache_bytes": rng.choice((1, 1 << 19, 1 << 28)),
    }
    generator = Generator(model, Tokenizer.bytes(), **limits)
    prompts, each = [], []
    for text in texts:
        prompts.append(text[: rng.randint(1, min(len(text), model.config.context - 1))])
        params = SamplingParams(
            max_tokens=rng.randint(1, 50),
            temperature=rng.choice((1.0, 0.7)),
            seed=rng.randrange(1 << 40),
            n=rng.choice((1, 1, 2, 5)),
            ignore_eos=True,
            prompt_logprobs=rng.random() < 0.3,
        )
        each.append(params)
    completions = generator.generate(prompts, each)
    asked = [pair for pair in zip(prompts, each, strict=True) for _ in range(pair[1].n)]
    sequences = [p + c.token_ids for (p, _), c in zip(asked, completions, strict=True)]
    cold = dict.fromkeys((1.0, 0.7))
    for temperature in cold:
        cold[temperature] = trained(model, sequences, temperature)
    for i, ((prompt, params), done) in enumerate(zip(asked, completions, strict=True)):
        raw, first = cold[1.0][i], len(prompt) - 1
        drawn = torch.tensor(done.sampled_logprobs)
        yield "scheduler", torch.tensor(done.logprobs), raw[first:]
        yield "scheduler", drawn, cold[params.temperature][i][first:]
        if done.prompt_logprobs:
            yield "prompts", torch.tensor(done.prompt_logprobs[1:]), raw[:first]
    stats = generator.scheduler.stats()
    events["preemptions"] += stats.preemptions
    events["tokens found in the cache"] += stats.cache_hits
    events["forks"] += sum(p.n - 1 for p in each)


events: Counter[str] = Counter()  # that the schedulers report


def compare(model: GPT, texts: list[list[int]], rng: random.Random) -> Iterator[Pair]:
    """Every way to the log-probabilities of some texts."""
    truth = [score(model, [text])[0] for text in texts]
    threads = torch.get_num_threads()
    for count in (threads, 1):
        torch.set_num_threads(count)
        order = rng.sample(range(len(texts)), len(texts))
        for i, ours in zip(order, score(model, [texts[i] for i in order]), strict=True):
            yield "packed", ours, truth[i]
    torch.set_num_threads(threads)
    for ours, theirs in zip(trained(model, texts, 1.0), truth, strict=True):
        yield "trained", ours, theirs
    with torch.no_grad(), model.frozen():
        for text, hidden, theirs in zip(texts, decoded(model, texts, rng), truth, strict=True):
            logits = model.logits(hidden[:-1])
            targets = torch.tensor(text[1:])
            found = ops.token_logprobs(logits, targets, entropy=False)
            yield "chunks", found.logprobs, theirs
            if rng.random() < 0.2:
                tokens, starts, _ = pack([text])
                alone = model.logits(model.hidden(tokens, starts)[:-1])
                yield "rows", logits, alone
    yield from sampled(model, texts, rng)


def differing(ours: Tensor, theirs: Tensor) -> int:
    """How many float32 numbers do not have the same bits."""
    return int((ours.view(torch.int32) != theirs.view(torch.int32)).sum())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=int, default=24)
    parser.add_argument("--logprobs", type=int, default=1_000_000, help="at least so many in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args(arguments)
    rng, began = random.Random(options.seed), time.perf_counter()
    torch.manual_seed(options.seed)
    compared: Counter[tuple[str, str]] = Counter()
    different: Counter[tuple[str, str]] = Counter()
    rows = 0
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for number in range(options.models):
        dtype = [*dtypes][number // len(FAMILIES) % 2]
        model = random_model(FAMILIES[number % len(FAMILIES)], dtypes[dtype], rng)
        wanted = options.logprobs * (number + 1) // options.models
        done = -1  # every model is compared once, whatever those before it have made too many
        while done < wanted:
            texts = random_texts(model, rng.choice((1, 4, 16, 64)), rng)
            for way, ours, theirs in compare(model, texts, rng):
                rows += len(ours) if way == "rows" else 0
                compared[way, dtype] += ours.numel()
                different[way, dtype] += differing(ours, theirs)
            done = sum(count for (way, _), count in compared.items() if way != "rows")
    lines = ["| way | dtype | compared | different |", "|---|---|---:|---:|"]
    for (way, dtype), count in sorted(compared.items()):
        lines.append(f"| {way} | {dtype} | {count:,} | {different[way, dtype]:,} |")
    also = ", ".join(f"{count:,} {name}" for name, count in events.items())
    lines.append(f"\n{options.models} models, {rows:,} whole rows; {also}.")
    lines.append(f"{time.perf_counter() - began:.0f} s on {device_name('cpu')}.")
    print(*lines, sep="\n")
    if options.record:
        made = f"`python bench/bench_bits.py`, {datetime.date.today()}, commit {commit()}."
        text = "\n".join(["# One set of bits", "", made, "", *lines]) + "\n"
        (Path(__file__).parent / "results" / "bits.md").write_text(text, encoding="utf-8")
    return 1 if different.total() else 0


if __name__ == "__main__":
    sys.exit(main())
