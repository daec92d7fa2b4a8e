"""The server, by raw HTTP: the wire format, streams, errors, and clients that leave."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import pytest
import torch
import uvicorn

from instructcore.cli import make_parser
from instructcore.config import unflatten
from instructcore.errors import UserError
from instructcore.generate import SamplingParams
from instructcore.model import GPT, ModelConfig
from instructcore.serve import ServeConfig, _Engine, make_app, run
from instructcore.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()
CONTEXT = 160
KEY = {"authorization": "Bearer sesame"}


def make_engine(stage: str = "sft") -> _Engine:
    """A random model over bytes, of which many are Chinese characters' bytes."""
    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size, context=CONTEXT, layers=1, heads=2, width=16, mlp_width=32
    )
    model = GPT(config, generator=torch.Generator().manual_seed(0))
    model.extra = {"stage": stage}
    return _Engine(model, TOKENIZER, ["toy", "an/alias", "text-davinci-003"])


class Client(httpx.Client):
    """A client of an engine served on a loopback port."""

    def __init__(self, engine: _Engine, api_key: str = "") -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        super().__init__(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60)
        self.engine = engine
        settings = uvicorn.Config(make_app(engine, api_key), log_level="critical", lifespan="off")
        self.server = uvicorn.Server(settings)
        arguments = {"sockets": [listener]}
        self.thread = threading.Thread(target=self.server.run, kwargs=arguments, daemon=True)
        self.thread.start()

    def complete(self, path: str = "/v1/completions", **fields) -> httpx.Response:
        body = {"model": "toy", "prompt": "hello", "max_tokens": 8, "temperature": 0} | fields
        return self.post(path, json={k: v for k, v in body.items() if v is not ...})

    def chat(self, *said: str, **fields) -> httpx.Response:
        roles = ("user", "assistant") * len(said)
        messages = [{"role": r, "content": s} for r, s in zip(roles, said, strict=False)]
        body = {"model": "toy", "messages": messages, "max_tokens": 8, "temperature": 0}
        return self.post("/v1/chat/completions", json=body | fields)

    def stop(self) -> None:
        self.close()
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def client():
    client = Client(make_engine())
    yield client
    client.stop()


def events(response: httpx.Response) -> list[dict]:
    """The JSON of a stream's events, whose form is checked."""
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream"
    *parts, done, rest = response.text.split("\n\n")
    assert done == "data: [DONE]" and rest == ""
    assert all(part.startswith("data: {") and "\n" not in part for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def error(response: httpx.Response, status: int, param: str | None, code: str | None = None) -> str:
    """The message of an error of this form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (name, body), *more = response.json().items()
    assert name == "error" and not more and body.keys() == {"message", "type", "param", "code"}
    assert (body["param"], body["code"]) == (param, code), body
    assert body["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return body["message"]


def test_completion(client):
    response = client.complete(prompt="hello", max_tokens=8)
    assert response.status_code == 200
    assert {"x-request-id", "openai-processing-ms"} <= response.headers.keys()
    body = response.json()
    (own,) = client.engine.generator.generate(
        [TOKENIZER.prompt_ids("hello")], SamplingParams(8, temperature=0)
    )
    assert body["id"].startswith("cmpl-") and body["object"] == "text_completion"
    assert body["model"] == "toy" and abs(body["created"] - time.time()) < 60
    choice = {"index": 0, "text": own.text, "logprobs": None, "finish_reason": own.finish_reason}
    assert body["choices"] == [choice]
    sampled = len(own.token_ids)  # 5 bytes and the marker are the prompt's
    usage = {"prompt_tokens": 6, "completion_tokens": sampled, "total_tokens": 6 + sampled}
    assert body["usage"] == usage


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
    client.stop()


def test_sampling_parameters_are_the_generators(client):
    fields = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 12, "n": 3, "top_k": 40}
    fields |= {"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1}
    fields |= {"min_p": 0.01, "min_tokens": 4, "stop": ["e", "\n"], "stop_token_ids": [65]}
    own = client.engine.generator.generate(
        [TOKENIZER.prompt_ids("hello")], SamplingParams(**fields | {"stop": ("e", "\n")})
    )
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
    (own,) = client.engine.generator.generate([ids], SamplingParams(8, temperature=0))
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

    decode, engine.model.logits = engine.model.decode, logits

    def remember(tokens, *arguments):
        engine.fed = tokens.tolist()[-1:]
        return decode(tokens, *arguments)

    engine.model.decode = remember
    chinese = Client(engine)
    chunks = events(chinese.complete(max_tokens=12, stream=True))
    assert [c["choices"][0]["text"] for c in chunks] == ["文", "文", "文", "文", ""]
    chinese.stop()


def test_echo_and_logprobs(client):
    """Scores of a text that is already there, as evaluation harnesses ask for them."""
    fields = {"prompt": "héllo", "echo": True, "logprobs": 2, "max_tokens": 0}
    (choice,) = client.complete(**fields).json()["choices"]
    assert choice["text"] == "héllo" and choice["finish_reason"] == "length"
    scores = choice["logprobs"]
    assert scores["tokens"] == ["h", "\\xc3", "\\xa9", "l", "l", "o"]
    assert scores["text_offset"] == [0, 1, 1, 2, 3, 4]
    ids = TOKENIZER.prompt_ids("héllo")
    model = client.engine.model
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
    last = events(client.complete(stream=True, **fields))[-1]["choices"][0]
    assert last["logprobs"] == choice["logprobs"]


def test_models_and_engines(client):
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    assert [m["id"] for m in body["data"]] == ["toy", "an/alias", "text-davinci-003"]
    for path in ("an/alias", "an%2Falias"):
        card = client.get(f"/v1/models/{path}").json()
        assert card["id"] == "an/alias" and card["object"] == "model"
        assert client.get(f"/v1/engines/{path}").json()["object"] == "engine"
        response = client.complete(f"/v1/engines/{path}/completions", model=...)
        assert response.json()["model"] == "an/alias"
    assert [e["id"] for e in client.get("/v1/engines").json()["data"]] == client.engine.names
    assert client.get("/health").status_code == 200
    for response in (
        client.get("/v1/models/gpt-5"),
        client.complete(model="gpt-5"),
        client.complete("/v1/engines/gpt-5/completions"),
    ):
        assert "'gpt-5'" in error(response, 404, "model", "model_not_found")


def test_api_key():
    client = Client(make_engine(), "sesame")
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models", headers=KEY).status_code == 200
    for headers in ({}, {"authorization": "Bearer sésame".encode()}, {"authorization": "sesame"}):
        error(client.get("/v1/models", headers=headers), 401, None, "invalid_api_key")
    client.stop()


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
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": True}, "n"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": list("abcde")}, "stop"),
    ({"stop_token_ids": [999]}, "stop_token_ids"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage"),
    ({"stream": True, "stream_options": {"more": True}}, "stream_options"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": "yes"}, "echo"),
    ({"seed": -1}, "seed"),
    ({"suffix": "x"}, "suffix"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"best_of": 2}, "best_of"),
    ({"messages": []}, "messages"),
    ({"whatever": 1}, "whatever"),
]


@pytest.mark.parametrize("fields, param", BAD, ids=[str(fields)[:40] for fields, _ in BAD])
def test_rejects(client, fields, param):
    code = "unsupported_parameter"
    unsupported = param in ("suffix", "logit_bias", "best_of", "messages", "whatever")
    message = error(client.complete(**fields), 400, param, code if unsupported else None)
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
    for message in (3, {"role": "tool", "content": "a"}, {"role": "user", "content": None}):
        error(client.chat("a", messages=[message]), 400, "messages")
    named = {"role": "user", "content": "a", "name": "b"}
    assert "name" in error(client.chat("a", messages=[named]), 400, "messages")
    error(client.chat("a", logprobs=True), 400, "logprobs", "unsupported_parameter")
    neutral = {"suffix": None, "logit_bias": {}, "best_of": 1, "user": "me", "stop": None}
    assert client.complete(**neutral).status_code == 200
    odd = client.post("/v1/completions", content=rb'{"model": "toy", "prompt": "\ud800"}')
    assert odd.status_code == 200


def test_a_bug_is_a_json_error(client, monkeypatch):
    def follow(*arguments):
        raise RuntimeError("secret")
        yield

    monkeypatch.setattr(client.engine.generator, "follow", follow)
    response = client.complete()
    assert "secret" not in error(response, 500, None)
    assert response.headers["x-should-retry"] == "false"
    text = client.complete(stream=True).text
    assert json.loads(text.removeprefix("data: "))["error"]["type"] == "server_error"


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_stop_their_generation(client, monkeypatch, stream):
    steps, ended = [], threading.Event()
    follow = client.engine.generator.follow

    def slow(*arguments):
        try:
            for step in follow(*arguments):
                steps.append(step)
                time.sleep(0.02)
                yield step
        finally:
            ended.set()

    monkeypatch.setattr(client.engine.generator, "follow", slow)
    fields = {"max_tokens": 150, "ignore_eos": True, "stream": stream, "model": "toy"}
    with httpx.Client(base_url=client.base_url, timeout=0.3) as other:
        with pytest.raises((httpx.ReadTimeout, StopIteration)):
            with other.stream("POST", "/v1/completions", json=fields | {"prompt": "a"}) as response:
                next(response.iter_lines())
                raise StopIteration
    assert ended.wait(10) and len(steps) < 100
    assert client.complete().status_code == 200  # the next one has its turn


def test_requests_wait_for_their_turn(client):
    answers: list[str] = []

    def ask() -> None:
        answers.append(client.complete(prompt="x").json()["choices"][0]["text"])

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 6 and len(set(answers)) == 1


def test_shutdown_ends_answers():
    engine = make_engine()
    client = Client(engine)
    engine.stopping = lambda: True
    response = client.complete()
    assert "shutting down" in error(response, 503, None)
    assert response.headers["retry-after"] == "1"
    client.stop()


def test_command(tmp_path, monkeypatch, capsys):
    parser = make_parser("serve", "", ServeConfig)
    values = vars(parser.parse_args(["x", "--alias", "a", "b", "--alias", "c", "--api-key", "k"]))
    config = unflatten(ServeConfig, values)
    assert config.alias == ("a", "b", "c") and config.api_key == "k" and config.port == 8000
    assert ServeConfig("x").alias == ("text-davinci-003",)
    engine = make_engine()
    engine.model.save(tmp_path / "mine", TOKENIZER)
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
