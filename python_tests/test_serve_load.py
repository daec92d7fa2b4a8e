"""The server under load and under attack: right answers, nothing leaked, always alive."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import socket
import string

import pytest
from serving import TOKENIZER, Client, eventually, make_engine

from instructcore.generate import Generator, SamplingParams

PROMPTS = [
    TOKENIZER.encode("The same beginning of many prompts, and then ") + [i] for i in range(97)
]


def body(i: int) -> dict:
    """Request number i: some share a beginning, some stop by themselves, some are several."""
    fields = {"max_tokens": 8 + i % 40, "temperature": (0.0, 1.0, 1.5)[i % 3], "seed": i}
    fields |= {"n": 1 + (i % 7 == 0), "stop": ["e", "\n"] if i % 5 == 0 else []}
    return fields | {"ignore_eos": i % 2 == 0}


async def ask(port: int, i: int, patience: int | None) -> list[str] | None:
    """The texts of request i, streamed; None if its client lost patience after so many chunks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = {"model": "toy", "prompt": PROMPTS[i % 97], "stream": True} | body(i)
    data = json.dumps(request).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    texts, chunks = [""] * request["n"], 0
    try:
        while chunks != patience:
            line = await reader.readline()
            assert line, "the server hung up"
            if line.startswith(b"HTTP/1.1"):
                assert line.split()[1] == b"200", line
            if line == b"data: [DONE]\n":
                return texts
            if line.startswith(b"data: "):
                (choice,) = json.loads(line[6:])["choices"]
                texts[choice["index"]] += choice["text"]
                chunks += 1
        return None
    finally:
        writer.close()


def resident() -> int:
    """Bytes of memory that this process holds."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_200_streams_half_cancelled(full):
    """Every other answer is that of the request alone; no page, request or memory is left behind.

    The requests that wait are as many as those that run, and one in eight finds the queue full
    but for that.
    """
    rounds, chance = (50 if full else 3), random.Random(0)
    engine = make_engine(max_batch=64, max_queue=400)
    generator = Generator(engine.served.scheduler.model, TOKENIZER)
    alone: dict[int, list[str]] = {}
    for i in range(200):
        fields = body(i) | {"stop": tuple(body(i)["stop"])}
        completions = generator.generate([PROMPTS[i % 97]], SamplingParams(**fields))
        alone[i] = [completion.text for completion in completions]
    with Client(engine) as client:

        async def round() -> int:
            patience = [chance.choice((None, chance.randint(0, 12))) for _ in range(200)]
            asked = [ask(client.port, i, patience[i]) for i in range(200)]
            answers = await asyncio.gather(*asked)
            for i, answer in enumerate(answers):
                assert answer in ((alone[i], None) if patience[i] is not None else (alone[i],)), i
            return sum(answer is None for answer in answers)

        sizes = []
        for _ in range(rounds):
            assert 50 < asyncio.run(round()) < 150
            eventually(lambda: not engine._owners and not engine.served.scheduler.busy)
            eventually(lambda: engine.stats.running == engine.stats.waiting == 0)
            assert engine.stats.blocks_used == 0
            assert sum(engine.served.scheduler._pages.holders) == 0
            sizes.append(resident())
        later = sizes[len(sizes) // 2 :]
        assert max(later) - later[0] < 8 << 20, sizes
        assert client.complete().status_code == 200


def anything(chance: random.Random, depth: int = 0):
    """A JSON value, or what Python's json writes for one."""
    huge = 10 ** chance.randint(1, 400)
    values = [None, True, False, 0, 1, -1, 2, 8, 0.5, -0.0, huge, -huge, 1e308, 1e-308]
    values += [float("nan"), float("inf"), "", "a", "文🙂", "\ud800", "\0", "x" * 5000, "null"]
    kind = chance.random()
    if kind < 0.75 or depth > 3:
        return chance.choice(values)
    if kind < 0.9:
        return [anything(chance, depth + 1) for _ in range(chance.randint(0, 5))]
    return {chance.choice("ab1"): anything(chance, depth + 1) for _ in range(chance.randint(0, 3))}


FIELDS = (
    "model prompt messages max_tokens max_completion_tokens temperature top_p top_k min_p n best_of"
    " stream stream_options logprobs top_logprobs echo stop stop_token_ids presence_penalty user"
    " frequency_penalty repetition_penalty logit_bias suffix seed min_tokens ignore_eos raw tools"
    " return_token_ids response_format nothing"
).split()


def test_malformed_requests(full):
    """Whatever the fields hold, the answer is one of the contract's, and the next one is right."""
    chance = random.Random(0)
    with Client(make_engine()) as client:
        before = client.complete().json()["choices"]
        for _ in range(20_000 if full else 600):
            said = [{"role": "user", "content": "a"}]
            fields = {"model": "toy", "prompt": "a", "messages": said, "max_tokens": 4}
            for name in chance.sample(FIELDS, chance.randint(1, 3)):
                fields[name] = anything(chance)
            path = chance.choice(("completions", "chat/completions", "engines/toy/completions"))
            fields.pop("prompt" if path.startswith("chat") else "messages", None)
            response = client.post(f"/v1/{path}", content=json.dumps(fields).encode())
            assert response.status_code in (200, 400, 404), (response.text, fields)
            if response.status_code > 200:
                assert response.json()["error"]["message"]
            elif response.headers["content-type"] != "text/event-stream":
                assert all(c["finish_reason"] for c in response.json()["choices"])
            else:
                assert response.text.endswith("data: [DONE]\n\n")
        for nest in ("[", '{"a":', '{"prompt":[', '{"stop":[['):
            response = client.post("/v1/completions", content=nest * 200_000)
            assert response.status_code == 400
        assert client.complete().json()["choices"] == before
        assert client.engine.stats.blocks_used == len(client.engine._owners) == 0


@pytest.mark.parametrize("junk", ["noise", "cut", "slow"])
def test_connections_that_misbehave(junk):
    """Noise, requests that end in the middle, and clients that say a byte and then nothing."""
    chance = random.Random(0)
    good = b'{"model": "toy", "prompt": "a", "max_tokens": 100, "stream": true, "ignore_eos": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(good)
    with Client(make_engine()) as client:
        before, held = client.complete().json()["choices"], []
        for i in range(100):
            connection = socket.create_connection(("127.0.0.1", client.port))
            if junk == "noise":
                letters = chance.choices(string.printable.encode() + b"\x00\xff", k=2000)
                connection.sendall(chance.choice((b"", b"GET / HTTP/1.1\r\n")) + bytes(letters))
                connection.close()
            elif junk == "cut":
                connection.sendall((head + good)[: chance.randint(1, len(head + good))])
                connection.close()
            else:  # it does not even read its answer
                connection.sendall((head + good)[: (1, len(head) + 1, None)[i % 3]])
                held.append(connection)
        assert client.complete().json()["choices"] == before
        eventually(lambda: client.engine.stats.running == len(client.engine._owners) == 0)
        assert client.engine.stats.blocks_used == 0
        for connection in held:
            connection.close()
