"""The server against the generator that it wraps: what HTTP, JSON and streaming cost.

`python bench/bench.py serve` times bursts of requests, all at once: streamed by a server process,
and by `Generator.generate` in this one. `python bench/bench_serve.py` measures what clients see:
so many of them, each asking again as soon as it is answered; p50 and p99 of the whole answer and of
its first token, and tokens per second of all together.

The model is a llama of 16.9 M parameters with random weights; prompts and answers are 64 tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from bench import Case, device_name, quantile

from instructcore.generate import Generator, SamplingParams
from instructcore.model import GPT, ModelConfig, load
from instructcore.tokenizer import Tokenizer

TOKENS = 64  # of a prompt, and of an answer
SHAPE = {"family": "llama", "vocab_size": 8192, "context": 512, "layers": 6, "heads": 6}
SHAPE |= {"kv_heads": 6, "width": 384, "mlp_width": 1024}


@cache
def checkpoint() -> Path:
    path = Path(tempfile.mkdtemp()) / "model"
    GPT(ModelConfig(**SHAPE), generator=torch.Generator().manual_seed(0)).save(
        path, Tokenizer.bytes()
    )
    return path


@cache
def server(device: str) -> int:
    """The port of a server in a process of its own, until this one ends."""
    where = ["--port", "0", "--device", device, "--dtype", "float32", "--max-queue", "4096"]
    command = [sys.executable, "-m", "instructcore", "serve", str(checkpoint()), *where]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return int(process.stdout.readline().rpartition(":")[2])


def prompt(number: int) -> list[int]:
    """Of bytes at random; none begins like another one's, so none is remembered."""
    random = torch.Generator().manual_seed(number)
    return torch.randint(256, (TOKENS,), generator=random).tolist()


async def ask(port: int, number: int) -> tuple[float, float]:
    """Seconds to the first event and to the last one of a streamed answer."""
    fields = {"model": "model", "prompt": prompt(number), "max_tokens": TOKENS, "seed": number}
    data = json.dumps(
        fields | {"ignore_eos": True, "stream": True, "return_token_ids": True}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    begin, first, got = time.perf_counter(), 0.0, 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + data)
    while (line := await reader.readline()) != b"data: [DONE]\n":
        if line.startswith(b"data: "):
            first = first or time.perf_counter() - begin
            got += len(json.loads(line[6:])["choices"][0].get("token_ids", ()))
    writer.close()
    if got != TOKENS:
        raise RuntimeError(f"an answer had {got} tokens")
    return first, time.perf_counter() - begin


def cases(device: str) -> Iterator[Case]:
    port, count = server(device), iter(range(1 << 40))
    generator = Generator(load(checkpoint(), dtype=torch.float32, device=device), Tokenizer.bytes())

    for at_once in (1, 16, 64):

        def served(at_once: int = at_once) -> None:
            async def burst() -> None:
                await asyncio.gather(*(ask(port, next(count)) for _ in range(at_once)))

            asyncio.run(burst())

        def generated(at_once: int = at_once) -> None:
            numbers = [next(count) for _ in range(at_once)]
            params = [SamplingParams(TOKENS, seed=i, ignore_eos=True) for i in numbers]
            generator.generate([prompt(i) for i in numbers], params)

        name = f"{at_once} at once, {TOKENS} + {TOKENS} tokens"
        yield Case(name, "float32", "stream", {"ours": served, "generate": generated})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64, 200])
    parser.add_argument("--seconds", type=float, default=10.0, help="per number of clients")
    options = parser.parse_args()
    port = server(options.device)
    print(device_name(options.device))
    print("clients requests  tokens/s   first token p50   p99 ms   whole answer p50   p99 ms")
    for clients in options.clients:
        numbers = iter(range(clients << 32, 1 << 62))
        times: list[tuple[float, float]] = []
        begin = time.perf_counter()

        async def client(end: float) -> None:
            while time.perf_counter() < end:
                times.append(await ask(port, next(numbers)))  # noqa: B023

        async def crowd(count: int, end: float) -> None:
            await asyncio.gather(*(client(end) for _ in range(count)))  # noqa: B023

        asyncio.run(crowd(clients, begin + options.seconds))
        rate = TOKENS * len(times) / (time.perf_counter() - begin)
        first, whole = ([1000 * t for t in column] for column in zip(*times, strict=True))
        columns = (quantile(first, 0.5), quantile(first, 0.99), quantile(whole, 0.5))
        print(f"{clients:>7} {len(times):>8} {rate:>9.0f}", end="")
        print("".join(f"{ms:>14.1f}" for ms in (*columns, quantile(whole, 0.99))), flush=True)


if __name__ == "__main__":
    main()
