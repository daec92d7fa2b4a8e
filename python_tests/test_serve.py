"""The server, by raw HTTP: the wire format, streams, errors, limits, and clients that leave."""

from __future__ import annotations

import functools
import http.client
import json
import math
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote_plus

import httpx
import pytest
import torch
import uvicorn
from serving import (
    CONTEXT,
    NAMES,
    TOKENIZER,
    Client,
    error,
    events,
    eventually,
    make_engine,
    make_model,
)

from instructcore import serve
from instructcore.cli import make_parser
from instructcore.config import unflatten
from instructcore.errors import UserError
from instructcore.generate import Generator, SamplingParams, score
from instructcore.scheduler import Scheduler
from instructcore.serve import Engine, ServeConfig, listen, run
from instructcore.serve_wire import Checkpoint

KEY = {"authorization": "Bearer sesame"}


@pytest.fixture(scope="module")
def client():
    client = Client(make_engine())
    yield client
    client.close()


def alone(model, ids: list[int], **params) -> list:
    """What the generator makes of a prompt."""
    return Generator(model, TOKENIZER).generate([ids], SamplingParams(**params))


def slowly(engine, monkeypatch, seconds: float = 0.02) -> None:
    """Every step takes so long."""
    step = engine.served.scheduler.step
    monkeypatch.setattr(engine.served.scheduler, "step", lambda: time.sleep(seconds) or step())


def test_completion(client):
    response = client.complete(prompt="hello", max_tokens=8)
    assert response.status_code == 200
    assert {"x-request-id", "openai-processing-ms"} <= response.headers.keys()
    body = response.json()
    ids = TOKENIZER.prompt_ids("hello")
    (own,) = alone(client.model, ids, max_tokens=8, temperature=0)
    assert body["id"].startswith("cmpl-") and body["object"] == "text_completion"
    assert body["model"] == "toy" and abs(body["created"] - time.time()) < 60
    choice = {"index": 0, "text": own.text, "logprobs": None, "finish_reason": own.finish_reason}
    assert body["choices"] == [choice]
    sampled = len(own.token_ids)  # 5 bytes and the marker are the prompt's
    usage = {"prompt_tokens": 6, "completion_tokens": sampled, "total_tokens": 6 + sampled}
    assert body["usage"] == usage


def test_defaults(client):
    """OpenAI's: 16 tokens at temperature 1, one response, nothing of it shown twice."""
    said = {"model": "toy", "prompt": "hello", "ignore_eos": True, "seed": 5}
    plain = client.post("/v1/completions", json=said).json()
    assert plain["usage"]["completion_tokens"] == 16
    spelt = {"max_tokens": 16, "temperature": 1, "top_p": 1, "n": 1, "stream": False}
    spelt |= {"logprobs": None, "echo": False, "stop": None, "presence_penalty": 0, "best_of": 1}
    spelt |= {"frequency_penalty": 0, "logit_bias": {}}
    assert client.post("/v1/completions", json=said | spelt).json()["choices"] == plain["choices"]


def test_prompts_as_texts_and_tokens(client):
    ids = TOKENIZER.encode("hello")
    assert client.complete(prompt=ids).json()["usage"]["prompt_tokens"] == 5  # no marker
    raw = client.complete(prompt="hello", raw=True).json()["choices"]
    assert client.complete(prompt=ids).json()["choices"] == raw
    marked = client.complete(prompt=TOKENIZER.prompt_ids("hello")).json()["choices"]
    assert client.complete(prompt=["hello"]).json()["choices"] == marked != raw
    several = client.complete(prompt=[ids, ids[::-1]], n=2).json()
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    assert several["choices"][0]["text"] == several["choices"][1]["text"] == raw[0]["text"]
    assert several["usage"]["prompt_tokens"] == 10
    assert client.complete(prompt="").json()["usage"]["prompt_tokens"] == 1  # the marker alone


def test_base_checkpoint_gets_no_marker():
    client = Client(make_engine("pretrain"))
    assert client.complete(prompt="hello").json()["usage"]["prompt_tokens"] == 5
    assert "at least one token" in error(client.complete(prompt=""), 400, "prompt")
    client.close()


def test_sampling_parameters_are_the_generators(client):
    fields = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 12, "n": 3, "top_k": 40}
    fields |= {"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1}
    fields |= {"min_p": 0.01, "min_tokens": 4, "stop": ["e", "\n"], "stop_token_ids": [65]}
    own = alone(client.model, TOKENIZER.prompt_ids("hello"), **fields | {"stop": ("e", "\n")})
    choices = client.complete(**fields).json()["choices"]
    assert [c["text"] for c in choices] == [c.text for c in own]
    assert [c["finish_reason"] for c in choices] == [c.finish_reason for c in own]
    hot = {"temperature": 1.0, "max_tokens": 24}
    texts = [client.complete(**hot).json()["choices"][0]["text"] for _ in range(3)]
    assert len(set(texts)) == 3  # no seed: another one each time
    same = client.complete(prompt=["a"] * 3, seed=1, **hot).json()["choices"]
    assert len({choice["text"] for choice in same}) == 3


def test_chat(client):
    response = client.chat("hi", "yes", "and?")
    body = response.json()
    end, marker = TOKENIZER.eos_id, TOKENIZER.assistant_id
    ids = [*b"hi", marker, *b"yes", end, *b"and?", marker]
    (own,) = alone(client.model, ids, max_tokens=8, temperature=0)
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"
    message = {"role": "assistant", "content": own.text, "refusal": None}
    (choice,) = body["choices"]
    assert choice["message"] == message and choice["finish_reason"] == own.finish_reason
    assert body["usage"]["prompt_tokens"] == len(ids)
    assert client.chat("hi", max_tokens=None, max_completion_tokens=3).status_code == 200
    whole = client.chat("hi", max_tokens=None, ignore_eos=True).json()["usage"]
    assert whole["total_tokens"] == CONTEXT


def test_streams_join_to_the_whole(client):
    fields = {"temperature": 1.0, "seed": 3, "max_tokens": 60, "n": 3, "stop": ["q", "zz"]}
    whole = client.complete(**fields).json()
    parts = events(client.complete(stream=True, stream_options={"include_usage": True}, **fields))
    *chunks, last = parts
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    assert len({(p["id"], p["object"], p["created"], p["model"]) for p in parts}) == 1
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == choice["finish_reason"]
    assert any("\ufffd" in choice["text"] for choice in whole["choices"])  # bytes at random

    fields = {"temperature": 1.0, "seed": 3, "max_tokens": 60}
    chunks = events(client.chat("hi", stream=True, **fields))
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in c for c in chunks)
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    content = "".join(delta["content"] for delta in deltas[:-1])
    (choice,) = client.chat("hi", **fields).json()["choices"]
    assert content == choice["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_any_stream_joins_to_its_whole(client, chat):
    """Random requests, streamed and not: texts, log-probabilities, ids, reasons and usage."""
    chance = random.Random(chat)
    for _ in range(60):
        fields = {"temperature": chance.choice((0, 1, 1.5)), "seed": chance.randrange(99)}
        fields |= {"max_tokens": chance.randint(1, 40), "n": chance.choice((1, 1, 2, 5))}
        fields |= {
            "stop": chance.sample(["a", "e", "th", "\ufffd\ufffd", "文"], chance.randint(0, 3))
        }
        fields |= {"min_tokens": chance.choice((0, 0, 9)), "ignore_eos": chance.random() < 0.5}
        fields |= {"return_token_ids": chance.random() < 0.5}
        if chat:
            shown = chance.choice((None, 0, 3))
            fields |= {} if shown is None else {"logprobs": True, "top_logprobs": shown}
        else:
            fields |= {"prompt": chance.choice(("héllo", ["a", "文"], [[65, 66], [5]], [9, 200]))}
            fields |= {"logprobs": chance.choice((None, 0, 3)), "echo": chance.random() < 0.5}
        ask = functools.partial(client.chat, "hi") if chat else client.complete
        whole = ask(**fields).json()
        *chunks, last = events(ask(stream=True, stream_options={"include_usage": True}, **fields))
        assert last["usage"] == whole["usage"]
        for choice in whole["choices"]:
            joined: dict = {"text": "", "ids": [], "logprobs": {}, "reasons": []}
            for (part,) in (chunk["choices"] for chunk in chunks):
                if part["index"] == choice["index"]:
                    joined["text"] += part["delta"].get("content", "") if chat else part["text"]
                    joined["ids"] += part.get("token_ids", [])
                    joined["reasons"] += [part["finish_reason"]] if part["finish_reason"] else []
                    for name, values in (part["logprobs"] or {}).items():
                        joined["logprobs"][name] = joined["logprobs"].get(name, []) + (values or [])
            scores = choice["logprobs"] or {}
            assert joined == {
                "text": choice["message"]["content"] if chat else choice["text"],
                "ids": choice.get("token_ids", []),
                "logprobs": scores | ({"refusal": []} if chat and scores else {}),
                "reasons": [choice["finish_reason"]],
            }, fields


def test_no_piece_ends_inside_a_character(client):
    """An echo of Chinese, and a model made to say nothing but 文."""
    text = "中文 <|eos|> 🙂"
    fields = {"prompt": text, "echo": True, "stream": True, "max_tokens": 0}
    assert "".join(c["choices"][0]["text"] for c in events(client.complete(**fields))) == text
    engine = make_engine()
    follow = dict(zip([TOKENIZER.assistant_id, *"文".encode()], "文".encode() * 2, strict=False))

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(hidden), TOKENIZER.vocab_size)
        for row, id in enumerate(engine.fed[-len(hidden) :]):
            out[row, follow[id]] = 9.0
        return out

    decode, engine.served.scheduler.model.logits = engine.served.scheduler.model.decode, logits

    def remember(tokens, *arguments):
        engine.fed = tokens.tolist()[-1:]
        return decode(tokens, *arguments)

    engine.served.scheduler.model.decode = remember
    chinese = Client(engine)
    chunks = events(chinese.complete(max_tokens=12, stream=True))
    assert [c["choices"][0]["text"] for c in chunks] == ["文", "文", "文", "文", ""]
    chinese.close()


def test_echo_and_logprobs(client):
    """Scores of a text that is already there, as evaluation harnesses ask for them."""
    fields = {"prompt": "héllo", "echo": True, "logprobs": 2, "max_tokens": 0}
    (choice,) = client.complete(**fields).json()["choices"]
    assert choice["text"] == "héllo" and choice["finish_reason"] == "length"
    scores = choice["logprobs"]
    assert scores["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9", "l", "l", "o"]
    assert scores["text_offset"] == [0, 1, 1, 2, 3, 4]
    ids = TOKENIZER.prompt_ids("héllo")
    model = client.model
    rows = model(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32))
    truth = rows.log_softmax(-1).detach()
    own = truth[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:-1, 0]
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    torch.testing.assert_close(torch.tensor(scores["token_logprobs"][1:]), own)
    for name, logprob, top, row in zip(
        scores["tokens"][1:],
        scores["token_logprobs"][1:],
        scores["top_logprobs"][1:],
        truth,
        strict=False,
    ):
        assert top[name] == logprob and len(top) in (2, 3)
        assert max(top.values()) == pytest.approx(row.max().item(), rel=1e-5)

    for prompt in ("", [65]):
        (empty,) = client.complete(**fields | {"prompt": prompt}).json()["choices"]
        assert empty["logprobs"]["token_logprobs"] == [None] * len(prompt)

    fields |= {"max_tokens": 5, "logprobs": 0}
    (choice,) = client.complete(**fields).json()["choices"]
    (alone,) = client.complete(**fields | {"echo": False}).json()["choices"]
    assert choice["text"] == "héllo" + alone["text"]
    assert choice["logprobs"]["token_logprobs"][6:] == alone["logprobs"]["token_logprobs"]
    assert all(len(top) == 1 for top in alone["logprobs"]["top_logprobs"])
    fields |= {"n": 2, "temperature": 1, "seed": 5, "return_token_ids": True}
    whole = client.complete(**fields).json()["choices"]
    assert len({tuple(choice["token_ids"]) for choice in whole}) == 2
    streamed = [{}, {}]
    for chunk in events(client.complete(stream=True, **fields)):
        (choice,) = chunk["choices"]
        parts = streamed[choice["index"]]
        for name, value in (choice.pop("logprobs") or {}).items():
            parts[name] = parts.get(name, []) + value
        parts["text"] = parts.get("text", "") + choice["text"]
        parts["ids"] = parts.get("ids", []) + choice.get("token_ids", [])
    for choice, parts in zip(whole, streamed, strict=True):
        assert choice["prompt_token_ids"] == TOKENIZER.prompt_ids("héllo")
        assert parts == choice["logprobs"] | {"text": choice["text"], "ids": choice["token_ids"]}


def test_logprobs_of_chat(client):
    """Each token with its true bytes, also where they are no text by themselves."""
    fields = {"logprobs": True, "temperature": 1, "seed": 3, "max_tokens": 40}
    (choice,) = client.chat("hi", top_logprobs=3, **fields).json()["choices"]
    assert choice["logprobs"]["refusal"] is None
    content = choice["logprobs"]["content"]
    ids = [*b"hi", TOKENIZER.assistant_id]
    (own,) = alone(client.model, ids, max_tokens=40, seed=3, top_logprobs=3)
    assert [entry["logprob"] for entry in content] == own.logprobs
    for entry, id, top in zip(content, own.token_ids, own.top_logprobs, strict=True):
        assert entry["bytes"] == (list(TOKENIZER.token_bytes(id)) or None)
        assert [x["logprob"] for x in entry["top_logprobs"]] == list(top.values())
        assert [x["bytes"] for x in entry["top_logprobs"]] == [
            list(TOKENIZER.token_bytes(other)) or None for other in top
        ]
    spelt = bytes(byte for entry in content for byte in entry["bytes"] or ())
    assert spelt.decode("utf-8", "replace") == choice["message"]["content"]
    assert any(entry["token"].startswith("\\x") for entry in content)
    (choice,) = client.chat("hi", **fields).json()["choices"]
    assert all(entry["top_logprobs"] == [] for entry in choice["logprobs"]["content"])
    chunks = events(client.chat("hi", stream=True, **fields))
    parts = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert [e for part in parts for e in part["content"]] == choice["logprobs"]["content"]


def test_evaluation_harness(client):
    """The requests that lm-eval's local-completions makes: its sums are the scores in process."""
    ids = [TOKENIZER.encode(text) for text in ("The cat sat.", "天地玄黄", "a" * 120)]
    own = [row.tolist() for row in score(client.model, ids)]
    asked = dict(prompt=ids, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)
    choices = client.complete(**asked).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    rows = client.model(
        torch.tensor(sum(ids, [])), torch.tensor([0, 12, 24, 144], dtype=torch.int32)
    )
    best, at = rows.argmax(-1).tolist(), 0
    for choice, row, prompt in zip(choices, own, ids, strict=True):
        begin = 3  # of the continuation that is scored
        logprobs = choice["logprobs"]["token_logprobs"][begin:-1]
        assert logprobs == row[begin - 1 :] and sum(logprobs) == sum(row[begin - 1 :])
        for i, top in enumerate(choice["logprobs"]["top_logprobs"][begin:-1], begin):
            greedy = logprobs[i - begin] == max(top.values())
            assert greedy == (prompt[i] == best[at + i - 1])
        at += len(prompt)


def test_logit_bias(client):
    fields = {"temperature": 1, "seed": 1, "max_tokens": 20}
    forced = client.complete(logit_bias={"65": 100}, **fields).json()["choices"]
    assert forced[0]["text"] == "A" * 20
    text = client.complete(prompt="a" * 20, logit_bias={"65": 100, "66": 100}, **fields).json()
    assert set(text["choices"][0]["text"]) == {"A", "B"}
    end = {str(TOKENIZER.eos_id): -100}
    usage = client.complete(logit_bias=end, **fields | {"max_tokens": 140}).json()["usage"]
    assert usage["completion_tokens"] == 140


def test_best_of(client):
    """The likeliest per token of those that n alone would make, the likeliest first."""
    fields = {"temperature": 1, "seed": 4, "logprobs": 0, "prompt": ["a", "b"]}
    many = client.complete(n=8, **fields).json()
    body = client.complete(n=3, best_of=8, **fields).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert body["usage"] == many["usage"]  # all of them cost
    for group, made in (
        (body["choices"][:3], many["choices"][:8]),
        (body["choices"][3:], many["choices"][8:]),
    ):
        rows = [choice["logprobs"]["token_logprobs"] for choice in made]
        best = sorted(range(8), key=lambda i: -sum(rows[i]) / len(rows[i]))[:3]
        assert [c["text"] for c in group] == [made[i]["text"] for i in best]
    texts = {choice["text"] for choice in many["choices"]}
    assert len(texts) == 16  # nor do equal prompts share their noise
    same = client.complete(**fields | {"prompt": ["a"] * 2}, n=4).json()["choices"]
    assert len({choice["text"] for choice in same}) == 8
    assert client.complete(echo=True, max_tokens=0, best_of=2).status_code == 200
    streamed = client.complete(stream=True, best_of=2, n=2)
    assert {c["choices"][0]["index"] for c in events(streamed)} == {0, 1}


def test_models_and_engines(client):
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    assert [m["id"] for m in body["data"]] == NAMES
    for path in ("an/alias", "an%2Falias"):
        card = client.get(f"/v1/models/{path}").json()
        assert card["id"] == "an/alias" and card["object"] == "model"
        assert client.get(f"/v1/engines/{path}").json()["object"] == "engine"
        response = client.complete(f"/v1/engines/{path}/completions", model=...)
        assert response.json()["model"] == "an/alias"
    assert [e["id"] for e in client.get("/v1/engines").json()["data"]] == NAMES
    assert client.get("/health").json() == {"status": "ok"}
    spaced = Client(Engine(Checkpoint(Scheduler(make_model(), TOKENIZER), ["my model"])))
    path = f"/v1/engines/{quote_plus('my model')}/completions"
    assert spaced.complete(path, model=...).json()["model"] == "my model"
    spaced.close()
    for response in (
        client.get("/v1/models/gpt-5"),
        client.complete(model="gpt-5"),
        client.complete("/v1/engines/gpt-5/completions"),
    ):
        assert "'gpt-5'" in error(response, 404, "model", "model_not_found")


def test_api_key():
    client = Client(make_engine(), "sesame")
    assert client.get("/health").status_code == 200
    for scheme in ("Bearer", "bearer"):  # schemes have no case
        headers = {"authorization": f"{scheme} sesame"}
        assert client.get("/v1/models", headers=headers).status_code == 200
    big = client.post("/v1/completions", content=b"x" * (9 << 20))  # hears it, too
    error(big, 401, None, "invalid_api_key")
    for headers in ({}, {"authorization": "Bearer sésame".encode()}, {"authorization": "sesame"}):
        error(client.get("/v1/models", headers=headers), 401, None, "invalid_api_key")
    client.close()


BAD = [
    ({"model": ...}, "model"),
    ({"model": 3}, "model"),
    ({"prompt": ...}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [999]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"max_tokens": "8"}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 8.0}, "max_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": 10**20}, "top_k"),
    ({"top_k": 10**12}, "top_k"),
    ({"min_tokens": 1, "stop_token_ids": list(range(259))}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": True}, "n"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": list("abcde")}, "stop"),
    ({"stop_token_ids": [999]}, "stop_token_ids"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"more": True}}, "stream_options.more"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": "yes"}, "echo"),
    ({"seed": -1}, "seed"),
    ({"suffix": "x"}, "suffix"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"259": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"٣": 1}}, "logit_bias"),
    ({"logit_bias": {"5": "1"}}, "logit_bias"),
    ({"logit_bias": {"9" * 400: 1}}, "logit_bias"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"best_of": 129}, "n"),
    ({"stop": "x" * 257}, "stop"),
    ({"presence_penalty": 101}, "presence_penalty"),
    ({"repetition_penalty": 1e-3}, "repetition_penalty"),
    ({"return_token_ids": 1}, "return_token_ids"),
    ({"prompt": "a" * 10_000}, "prompt"),
    ({"messages": []}, "messages"),
    ({"whatever": 1}, "whatever"),
]


@pytest.mark.parametrize("fields, param", BAD, ids=[str(fields)[:40] for fields, _ in BAD])
def test_rejects(client, fields, param):
    unknown = ("suffix", "messages", "whatever", "stream_options.more")
    code = "unsupported_parameter" if param in unknown else None
    code = "context_length_exceeded" if fields == {"prompt": "a" * 10_000} else code
    message = error(client.complete(**fields), 400, param, code)
    assert param in message or param in ("n", "prompt", "stream_options"), message


def test_rejects_the_rest(client):
    for body in (b"", b"{", b"[1]", b'"x"', b"\xff", b"[" * 100_000, b"1" * 5000):
        error(client.post("/v1/completions", content=body), 400, None)
    assert error(client.post("/v1/nothing", json={}), 404, None) == "there is no POST /v1/nothing"
    error(client.get("/v1/completions"), 404, None)
    error(client.put("/v1/models"), 404, None)
    code = "context_length_exceeded"
    error(client.complete(prompt="a" * CONTEXT, max_tokens=1), 400, "prompt", code)
    error(client.complete(prompt="a", max_tokens=CONTEXT), 400, "prompt", code)
    assert client.complete(prompt="a", max_tokens=CONTEXT - 2).status_code == 200
    error(client.chat("a" * CONTEXT), 400, "messages", code)
    error(client.chat("a" * (CONTEXT - 1), max_tokens=None), 400, "messages", code)
    error(client.chat(), 400, "messages")
    error(client.chat("a", max_tokens=2, max_completion_tokens=2), 400, "max_tokens")
    error(client.chat("a", messages=[3]), 400, "messages[0]")
    error(client.chat("a", messages=[{"role": 3, "content": "a"}]), 400, "messages[0].role")
    for message in ({"role": "tool", "content": "a"}, {"role": "user", "content": None}):
        error(client.chat("a", messages=[message]), 400, "messages")
    named = {"role": "user", "content": "a", "name": "b"}
    error(client.chat("a", messages=[named]), 400, "messages[0].name", "unsupported_parameter")
    error(client.chat("a", top_logprobs=1), 400, "top_logprobs")
    error(client.chat("a", logprobs=True, top_logprobs=21), 400, "top_logprobs")
    error(client.chat("a", logprobs=1), 400, "logprobs")
    error(client.chat("a", tools=[{}]), 400, "tools", "unsupported_parameter")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for message in ({"type": "image_url", "image_url": {}}, "a", {"type": "text", "text": 1}):
        said = {"role": "user", "content": [*parts, message]}
        assert "parts" in error(client.chat("a", messages=[said]), 400, "messages")
    said = [{"role": "user", "content": parts}]
    assert client.chat("a", messages=said).json()["choices"] == client.chat("ab").json()["choices"]
    neutral = {"suffix": None, "logit_bias": {}, "best_of": 1, "user": "me", "stop": None}
    neutral |= {"logprobs": None, "tools": [], "response_format": {"type": "text"}}
    assert client.complete(**neutral).status_code == 200
    odd = client.post("/v1/completions", content=rb'{"model": "toy", "prompt": "\ud800"}')
    assert odd.status_code == 200


def test_a_bug_is_a_json_error(monkeypatch):
    """All who were in the step hear of it, and the next ones are served again."""
    client = Client(make_engine())
    head = client.model.logits
    monkeypatch.setattr(client.model, "logits", lambda hidden: head(hidden) * math.nan)
    response = client.complete()
    assert "NaN" not in error(response, 500, None)
    assert response.headers["x-should-retry"] == "false"
    error(client.complete(stream=True), 500, None)  # not a stream: nothing had been sent
    error(client.complete(n=3), 500, None)
    monkeypatch.setattr(client.model, "logits", head)
    assert client.complete().status_code == 200

    scheduler = client.scheduler
    step = scheduler.step

    def fails_later():
        if scheduler.stats().tokens_generated > 20:
            scheduler.step = step
            raise RuntimeError("secret")
        return step()

    scheduler.step = fails_later
    text = client.complete(stream=True, ignore_eos=True, max_tokens=100).text
    *_, last, rest = text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert rest == "" and "secret" not in text and "[DONE]" not in text
    assert client.complete().status_code == 200
    client.close()


def test_a_failed_step_holds_no_pages(monkeypatch):
    """One that fails between two requests of those it takes in, the first of which has its own."""
    with Client(make_engine()) as client:
        find = client.scheduler._next

        def fails(new, like=None):
            if new:
                raise MemoryError
            return find(new, like)

        with monkeypatch.context() as patch:
            patch.setattr(client.scheduler, "_next", fails)
            error(client.complete(prompt=["a" * 40, "b"]), 500, None)
        assert client.engine.stats.blocks_used == 0
        assert client.complete().status_code == 200


def test_no_memory_for_the_cache(monkeypatch):
    """What fails before a step, too, is an error of those who wait, and the next are served."""

    def fails():
        raise MemoryError

    client = Client(make_engine())
    with monkeypatch.context() as patch:
        patch.setattr(client.scheduler, "_allocate", fails)
        error(client.complete(), 500, None)
    assert client.complete().status_code == 200
    eventually(lambda: not client.engine._owners)
    client.close()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_forgotten(monkeypatch, stream, path):
    """Whether its request runs, as the first two do, or waits, as the third."""
    client = Client(make_engine(max_batch=2))
    slowly(client.engine, monkeypatch)
    said = {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    said.pop("messages" if path == "/v1/completions" else "prompt")
    body = {"max_tokens": 150, "ignore_eos": True, "stream": stream, "model": "toy"} | said
    connections = [http.client.HTTPConnection("127.0.0.1", client.port) for _ in range(3)]
    for connection in connections:
        connection.request("POST", path, json.dumps(body))
    eventually(lambda: (client.engine.stats.running, client.engine.stats.waiting) == (2, 1))
    connections[2].sock.close()
    eventually(lambda: client.engine.stats.waiting == 0)
    for connection in connections[:2]:
        connection.sock.close()
    eventually(lambda: client.engine.stats.running == 0 and not client.engine._owners)
    stats = client.engine.stats
    assert stats.blocks_used == 0 and stats.tokens_generated < 200
    kind = "chat" if "messages" in said else "completions"
    assert f'requests_total{{endpoint="{kind}",status="499"}} 3' in client.get("/metrics").text
    assert client.complete().status_code == 200
    client.close()


def takes_nothing(client, tokens: int) -> socket.socket:
    """A connection that asks for more than its buffers hold, and reads none of it."""
    fields = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 20}
    fields |= {"model": "toy", "n": 4, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    data = json.dumps(fields).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", client.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def test_who_reads_slowly_takes_no_place():
    """What waits to be sent is made: it is none of those that wait to be computed."""
    with Client(make_engine(context=1600, max_batch=4, max_queue=0)) as client:
        with takes_nothing(client, 1500):
            eventually(lambda: client.engine.stats.running == 4)
            error(client.complete(), 429, None, "rate_limit_exceeded")
            eventually(lambda: client.engine.stats.running == 0)
            assert len(client.engine._owners) == 4  # its connection is open still
            assert client.complete().status_code == 200
        eventually(lambda: not client.engine._owners)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="a feature of Linux")
def test_who_reads_nothing_is_forgotten(monkeypatch):
    monkeypatch.setattr(serve, "SEND_SECONDS", 0.5)
    with Client(make_engine(context=4096)) as client:
        with takes_nothing(client, 4000):
            eventually(lambda: client.engine.stats.running == 4)
            eventually(lambda: not client.engine._owners and client.engine.stats.running == 0)
        assert client.engine.stats.tokens_generated < 4 * 4000
        assert client.complete().status_code == 200


def test_back_pressure(monkeypatch):
    """What runs and what waits is bounded; who is turned away is told when to come again."""
    client = Client(make_engine(max_batch=2, max_queue=2))
    slowly(client.engine, monkeypatch)
    fields = {"max_tokens": 60, "ignore_eos": True}
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(client.complete, **fields, n=2) for _ in range(2)]
        eventually(lambda: client.engine.stats[:2] == (2, 2))  # they run, and wait
        for stream in (True, False):
            response = client.complete(stream=stream)
            assert "queue is full" in error(response, 429, None, "rate_limit_exceeded")
        assert client.metric("instructcore_running") == 2
        assert client.metric("instructcore_waiting") == 2
        assert client.get("/v1/models").status_code == 200
        assert [other.result().status_code for other in others] == [200, 200]
    assert client.complete().status_code == 200
    assert client.complete(n=9).status_code == 200  # more than run at a time
    client.close()


def test_bodies_are_bounded(client, monkeypatch):
    for content in (b" " * (10 << 20), iter([b" " * (1 << 20)] * 10)):
        response = client.post("/v1/completions", content=content)
        assert "at most 8388608 bytes" in error(response, 400, None)
    monkeypatch.setattr(client.engine.served.tokenizer, "encode", None)  # nothing is encoded
    prompt = client.complete(prompt="文" * 1_000_000)
    error(prompt, 400, "prompt", "context_length_exceeded")
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", client.port)) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
        answer = slow.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 400 ") and b"longer than 0.2 seconds" in answer


def test_metrics():
    client = Client(make_engine(), "sesame", **KEY)
    assert "\ninstructcore_request_seconds_count 0\n" in client.get("/metrics").text
    for _ in range(2):
        assert client.complete(prompt="a" * 64, max_tokens=5, ignore_eos=True).status_code == 200
    client.chat("a", max_tokens=3, ignore_eos=True, stream=True)
    client.complete(n=0)
    client.get("/nothing")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    named = {name.partition("{")[0] for name in samples}
    for suffix in ("_bucket", "_sum", "_count"):
        named = {name.removesuffix(suffix) for name in named}
    assert named == {line.split()[2] for line in lines if line.startswith("# TYPE ")}
    expected = {
        'requests_total{endpoint="completions",status="200"}': 2,
        'requests_total{endpoint="completions",status="400"}': 1,
        'requests_total{endpoint="chat",status="200"}': 1,
        'requests_total{endpoint="other",status="404"}': 1,
        "tokens_fed_total": 65 + 1 + 2,  # the second prompt's 4 pages are remembered
        "cache_hits_total": 64,
        "tokens_generated_total": 13,
        "running": 0,
        "waiting": 0,
        "blocks_used": 0,
        "request_seconds_count": 3,
        'request_seconds_bucket{le="+Inf"}': 3,
        "first_token_seconds_count": 3,
    }
    found = {name: float(samples[f"instructcore_{name}"]) for name in expected}
    assert found == expected
    whole = sum(float(samples[f"instructcore_blocks_{s}"]) for s in ("free", "cached"))
    assert whole >= 64 * CONTEXT / 16
    assert float(samples["instructcore_request_seconds_sum"]) > 0
    client.close()


def test_other_origins_are_refused(client):
    """A page somewhere that a browser here shows must not compute here; curl and our page may."""
    for site in ("cross-site", "same-site"):
        response = client.post("/v1/completions", headers={"sec-fetch-site": site}, content="{}")
        assert "another origin" in error(response, 403, None)
    for site in ("same-origin", "none"):
        headers = {"sec-fetch-site": site}
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_page_needs_nothing_from_elsewhere(client):
    response = client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "http:" not in response.text and "https:" not in response.text


def start(path, *flags: str) -> tuple[subprocess.Popen, str]:
    """The command in a process of its own, and its address."""
    command = [sys.executable, "-m", "instructcore", "serve", path.name, "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=path.parent)
    return process, process.stdout.readline().split()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(tmp_path, number):
    """The first one lets what runs finish and refuses what waits; a second one ends at once."""
    make_model(context=4096).save(tmp_path / "mine", TOKENIZER)
    fields = {"prompt": "a", "ignore_eos": True, "max_tokens": 1500, "stream": True}
    path = "/v1/engines/mine/completions"
    process, address = start(tmp_path / "mine", "--max-batch", "1")
    with httpx.Client(base_url=address, timeout=300) as client:
        with client.stream("POST", path, json=fields) as response:
            lines = response.iter_lines()
            next(lines)
            with ThreadPoolExecutor() as pool:
                waiting = pool.submit(client.post, path, json=fields)
                eventually(lambda: "instructcore_waiting 1\n" in client.get("/metrics").text)
                process.send_signal(number)
                error(waiting.result(), 503, None)
            *_, done, _ = lines
            assert done == "data: [DONE]"
            with pytest.raises(httpx.ConnectError):
                httpx.get(address)
    assert process.wait(60) == 0
    assert process.stdout.read().startswith("finishing what has begun")

    process, address = start(tmp_path / "mine")
    with httpx.stream("POST", address + path, json=fields | {"max_tokens": 4000}) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(number)
        assert process.stdout.readline().startswith("finishing")
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(10) == -number


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_connections_send_at_once(host):
    if host == "::1" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    with listen(host, 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        connection, _ = listener.accept()
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        connection.close()


def test_command(tmp_path, monkeypatch, capsys):
    parser = make_parser("serve", "", ServeConfig)
    values = vars(parser.parse_args(["x", "--alias", "a", "b", "--alias", "c", "--api-key", "k"]))
    config = unflatten(ServeConfig, values)
    assert config.alias == ("a", "b", "c") and config.api_key == "k" and config.port == 8000
    assert ServeConfig("x").alias == ("text-davinci-003",)
    make_model().save(tmp_path / "mine", TOKENIZER)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1, port {port}"):
            run(ServeConfig(str(tmp_path / "mine"), port=port))
    with pytest.raises(UserError, match="no checkpoint"):
        run(ServeConfig(str(tmp_path / "none")))

    served = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: served.append(sockets))
    run(ServeConfig(str(tmp_path / "mine"), port=0))
    assert len(served) == 1
    assert "serving mine, text-davinci-003 at http://127.0.0.1:" in capsys.readouterr().out
    if Path("/proc/net/if_inet6").exists():
        run(ServeConfig(str(tmp_path / "mine"), host="::1", port=0))
        assert "at http://[::1]:" in capsys.readouterr().out
