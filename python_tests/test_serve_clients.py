"""OpenAI's own clients against the server, of whatever version is installed: a black box.

`python python_tests/clients.py` runs this file, as it is, with the versions 0.28, 1, 2 and 3; there
INSTRUCTCORE_SERVERS has the addresses. Otherwise the servers are started here.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

openai = pytest.importorskip("openai")
VERSION = int(openai.__version__.partition(".")[0])
KEY, MODEL = "sesame", "text-davinci-003"
SNIPPET = """
import openai
response = openai.Completion.create(
    engine="text-davinci-003",
    prompt="写一篇关于人工智能的文章。",
    temperature=0.7,
    max_tokens=500,
)
print(response.choices[0].text)
"""
EXTENSIONS = {"top_k", "min_p", "min_tokens", "ignore_eos", "stop_token_ids", "return_token_ids"}


@pytest.fixture(scope="module")
def servers():
    """The addresses: main; full (one at a time, slowly); broken; breaking (later); leaving."""
    if known := os.environ.get("INSTRUCTCORE_SERVERS"):
        yield SimpleNamespace(**json.loads(known))
        return
    from serving import servers_for_clients

    with servers_for_clients(KEY) as addresses:
        yield SimpleNamespace(**addresses)


class Api:
    """One way to ask, whatever the version: an answer is a dictionary, a stream a list of them."""

    def __init__(self, how: str, address: str) -> None:
        self.is_async, self.settings = how == "async", {"api_key": KEY}
        self.settings["base_url" if VERSION else "api_base"] = f"{address}/v1"

    def ask(self, kind: str, *path, retries: int = 0, headers=None, key=KEY, **fields):
        settings = self.settings | {"api_key": key}
        if VERSION:
            settings |= {"max_retries": retries}
            extra = {name: fields.pop(name) for name in EXTENSIONS & fields.keys()}
            if extra or headers:
                fields |= {"extra_body": extra, "extra_headers": headers}
        else:
            settings |= {"headers": headers} if headers else {}
        return (
            asyncio.run(self._async(kind, path, settings, fields))
            if self.is_async
            else (self._sync(kind, path, settings, fields))
        )

    def _method(self, client, kind: str):
        if VERSION:
            owner, name = {
                "completions": (client.completions, "create"),
                "chat": (client.chat.completions, "create"),
                "models": (client.models, "list"),
                "model": (client.models, "retrieve"),
            }[kind]
            return getattr(owner, name)
        owner, name = {
            "completions": (openai.Completion, "create"),
            "chat": (openai.ChatCompletion, "create"),
            "models": (openai.Model, "list"),
            "model": (openai.Model, "retrieve"),
            "engines": (openai.Engine, "list"),
        }[kind]
        return getattr(owner, "a" + name if self.is_async else name)

    def _sync(self, kind, path, settings, fields):
        if VERSION:
            with openai.OpenAI(**settings) as client:
                answer = self._method(client, kind)(*path, **fields)
                return [plain(part) for part in answer] if "stream" in fields else plain(answer)
        answer = self._method(None, kind)(*path, **settings, **fields)
        return [plain(part) for part in answer] if "stream" in fields else plain(answer)

    async def _async(self, kind, path, settings, fields):
        if VERSION:
            async with openai.AsyncOpenAI(**settings) as client:
                answer = await self._method(client, kind)(*path, **fields)
                return (
                    [plain(part) async for part in answer] if "stream" in fields else plain(answer)
                )
        answer = await self._method(None, kind)(*path, **settings, **fields)
        return [plain(part) async for part in answer] if "stream" in fields else plain(answer)

    def complete(self, prompt="Hello", **fields):
        if VERSION == 0 and not {"model", "engine"} & fields.keys():
            fields["engine"] = MODEL
        fields = {"max_tokens": 12, "temperature": 0, "model": MODEL} | fields
        fields.pop("model" if "engine" in fields else "engine", None)
        return self.ask("completions", prompt=prompt, **fields)

    def chat(self, *said: str, **fields):
        roles = ("user", "assistant") * len(said)
        messages = [{"role": r, "content": s} for r, s in zip(roles, said)]  # noqa: B905
        fields = {"max_tokens": 12, "temperature": 0, "model": MODEL} | fields
        return self.ask("chat", messages=messages, **fields)


def plain(answer) -> dict:
    return answer.model_dump() if VERSION else answer.to_dict_recursive()


@pytest.fixture(params=["sync", "async"])
def api(request, servers) -> Api:
    return Api(request.param, servers.main)


def one(answer: dict) -> dict:
    (choice,) = answer["choices"]
    return choice


@pytest.mark.skipif(VERSION > 0, reason="openai 1 removed openai.Completion")
def test_the_snippet(servers):
    """What was written for OpenAI's server runs unmodified on this one."""
    own = {"OPENAI_API_BASE": f"{servers.main}/v1", "OPENAI_API_KEY": KEY}
    command = [sys.executable, "-c", SNIPPET]
    done = subprocess.run(
        command, env=os.environ | own, capture_output=True, check=True, timeout=60
    )
    assert len(done.stdout.decode()) > 1


def test_completion(api):
    body = api.complete("写一篇关于人工智能的文章。", temperature=0.7, max_tokens=40)
    assert body["object"] == "text_completion" and body["model"] == MODEL
    assert body["id"].startswith("cmpl-") and abs(body["created"] - time.time()) < 60
    assert isinstance(one(body)["text"], str)
    assert one(body)["finish_reason"] in ("stop", "length") and one(body)["logprobs"] is None
    usage = body["usage"]
    assert usage["prompt_tokens"] == len("写一篇关于人工智能的文章。".encode()) + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_n_and_several_prompts(api):
    fields = {"temperature": 1, "seed": 3, "max_tokens": 20}
    body = api.complete(["a", "b"], n=3, **fields)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert len({choice["text"] for choice in body["choices"]}) == 6
    assert body["usage"]["prompt_tokens"] == 4
    tokens = api.complete([[97], [98]], n=3, **fields)
    assert tokens["usage"]["prompt_tokens"] == 2  # token ids are taken as they are
    best = api.complete("a", n=2, best_of=5, **fields)
    assert len(best["choices"]) == 2
    made = api.complete("a", n=5, **fields)
    assert best["usage"] == made["usage"]
    assert {c["text"] for c in best["choices"]} < {c["text"] for c in made["choices"]}


def test_streamed_completion(api):
    fields = {"temperature": 1, "seed": 5, "max_tokens": 60, "n": 2, "stop": ["e", "文"]}
    whole = api.complete(**fields)
    *chunks, last = api.complete(stream=True, stream_options={"include_usage": True}, **fields)
    assert last["choices"] == [] and last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    for choice in whole["choices"]:
        parts = [one(chunk) for chunk in chunks if one(chunk)["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        assert all(part["finish_reason"] is None for part in parts[:-1])
    assert all(not chunk.get("usage") for chunk in chunks)


def test_echo_and_logprobs(api):
    choice = one(api.complete("héllo", echo=True, logprobs=3, max_tokens=0))
    assert choice["text"] == "héllo" and choice["finish_reason"] == "length"
    scores = choice["logprobs"]
    assert scores["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9", "l", "l", "o"]
    assert scores["text_offset"] == [0, 1, 1, 2, 3, 4]
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    for i in range(1, 6):
        top, own = scores["top_logprobs"][i], scores["token_logprobs"][i]
        assert top[scores["tokens"][i]] == own < 0 and len(top) in (3, 4)
    fields = {"logprobs": 0, "temperature": 1, "seed": 3, "max_tokens": 9}
    both = one(api.complete("héllo", echo=True, **fields))
    alone = one(api.complete("héllo", **fields))
    assert both["text"] == "héllo" + alone["text"]
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert both["logprobs"][name][6:] == alone["logprobs"][name]
    streamed = [one(chunk)["logprobs"] for chunk in api.complete("héllo", stream=True, **fields)]
    joined = [x for part in streamed if part for x in part["token_logprobs"]]
    assert joined == alone["logprobs"]["token_logprobs"]


def test_stop_and_logit_bias(api):
    forced = {"65": 50, "66": 50}
    fields = {"temperature": 1, "seed": 1, "max_tokens": 30, "logit_bias": forced}
    text = one(api.complete(**fields))["text"]
    assert set(text) == {"A", "B"} and len(text) == 30
    choice = one(api.complete(stop="AB", **fields))
    assert choice["finish_reason"] == "stop" and choice["text"] == text[: text.index("AB")]
    fields["logit_bias"] = {"65": 100}
    assert one(api.complete(stop=["AAAA", "x"], **fields))["text"] == ""
    assert one(api.chat("hi", **fields))["message"]["content"] == "A" * 30


def test_extensions(api):
    fields = {"temperature": 1, "seed": 2, "ignore_eos": True, "return_token_ids": True}
    choice = one(api.complete(top_k=1, max_tokens=9, **fields))
    assert len(choice["token_ids"]) == 9
    greedy = one(api.complete(max_tokens=9, **fields | {"temperature": 0}))
    assert choice["token_ids"] == greedy["token_ids"]
    end = greedy["token_ids"][0]
    stopped = one(api.complete(max_tokens=9, stop_token_ids=[end], **fields | {"temperature": 0}))
    assert stopped["token_ids"] == [end] and stopped["finish_reason"] == "stop"


def test_chat(api):
    fields = {"temperature": 1, "seed": 8, "max_tokens": 40}
    body = api.chat("hi", "yes", "and?", n=2, **fields)
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert len({choice["message"]["content"] for choice in body["choices"]}) == 2
    assert {choice["message"]["role"] for choice in body["choices"]} == {"assistant"}
    chunks = api.chat("hi", "yes", "and?", n=2, stream=True, **fields)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for choice in body["choices"]:
        parts = [one(chunk) for chunk in chunks if one(chunk)["index"] == choice["index"]]
        assert parts[0]["delta"]["role"] == "assistant"
        assert not any(parts[-1]["delta"].values())
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        text = "".join(part["delta"].get("content") or "" for part in parts)
        assert text == choice["message"]["content"]


def test_logprobs_of_chat(api):
    choice = one(api.chat("hi", logprobs=True, top_logprobs=2, temperature=1, seed=1))
    for entry in choice["logprobs"]["content"]:
        assert len(entry["top_logprobs"]) == 2 and entry["logprob"] <= 0
    spelt = b"".join(bytes(e["bytes"] or ()) for e in choice["logprobs"]["content"])
    assert spelt.decode("utf-8", "replace") == choice["message"]["content"]


def test_models(api):
    names = [model["id"] for model in api.ask("models")["data"]]
    assert names == ["toy", "an/alias", MODEL]
    for name in names:
        assert api.ask("model", name)["id"] == name
        assert api.complete(model=name)["model"] == name
    if VERSION == 0:
        assert [engine["id"] for engine in api.ask("engines")["data"]] == names
        assert api.complete(engine="an/alias")["model"] == "an/alias"


def refused(status: int, ask, *arguments, **fields) -> dict:
    """The error's body, after a look at its class."""
    old = {400: "InvalidRequest", 401: "Authentication", 403: "Permission", 404: "InvalidRequest"}
    old |= {429: "RateLimit", 500: "API", 503: "ServiceUnavailable"}
    new = {400: "BadRequest", 401: "Authentication", 403: "PermissionDenied", 404: "NotFound"}
    new |= {429: "RateLimit", 500: "InternalServer", 503: "InternalServer"}
    kind = getattr(openai if VERSION else openai.error, (new if VERSION else old)[status] + "Error")
    with pytest.raises(kind) as caught:
        ask(*arguments, **fields)
    assert type(caught.value) is kind
    error = caught.value
    assert (error.status_code if VERSION else error.http_status) == status
    return error.body if VERSION else json.loads(error.http_body)["error"]


def test_errors(api):
    body = refused(400, api.complete, n=0)
    assert (
        body["param"] == "n" and body["type"] == "invalid_request_error" and "n" in body["message"]
    )
    assert refused(400, api.complete, suffix="x")["code"] == "unsupported_parameter"
    assert refused(400, api.complete, max_tokens=5000)["code"] == "context_length_exceeded"
    assert (
        refused(400, api.chat, stream_options={"include_usage": True})["param"] == "stream_options"
    )
    assert refused(400, api.complete, best_of=3, stream=True)["param"] == "best_of"
    assert refused(401, api.complete, key="wrong")["code"] == "invalid_api_key"
    assert refused(403, api.complete, headers={"sec-fetch-site": "cross-site"})
    assert refused(404, api.complete, model="gpt-5")["code"] == "model_not_found"
    assert refused(404, api.chat, "a", model="gpt-5", stream=True)["code"] == "model_not_found"
    assert refused(404, api.ask, "model", "gpt-5")["code"] == "model_not_found"


@pytest.mark.parametrize("how", ["sync", "async"])
def test_errors_of_the_server(servers, how):
    for stream in ({}, {"stream": True}):
        assert refused(500, Api(how, servers.broken).complete, **stream)["type"] == "server_error"
        assert (
            "shutting down" in refused(503, Api(how, servers.leaving).complete, **stream)["message"]
        )
    kind = openai.APIError if VERSION else openai.error.APIError
    with pytest.raises(kind, match="the server made a mistake"):  # after the first pieces
        Api(how, servers.breaking).complete(stream=True, max_tokens=100, ignore_eos=True)


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_full_server(servers, how):
    """A second request is turned away until the first one's client leaves."""
    api, fields = Api("sync", servers.full), {"max_tokens": 900, "ignore_eos": True}
    if VERSION:
        client = openai.OpenAI(**api.settings)
        extra = {"ignore_eos": fields.pop("ignore_eos")}
        fields |= {"model": MODEL, "extra_body": extra}
        stream = client.completions.create(prompt="a", stream=True, **fields)
    else:
        fields |= api.settings | {"engine": MODEL}
        stream = openai.Completion.create(prompt="a", stream=True, **fields)
    next(iter(stream))
    assert refused(429, Api(how, servers.full).complete)["code"] == "rate_limit_exceeded"
    stream.close()
    if VERSION:  # the client itself tries again
        assert Api(how, servers.full).complete(retries=3)["choices"]
    else:
        time.sleep(0.5)
        assert Api(how, servers.full).complete()["choices"]
