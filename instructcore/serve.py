"""An OpenAI-compatible server: `instructcore serve CKPT`.

    _Ask      a request's JSON as prompts and parameters, and its answer as JSON
    _Engine   the model, and the one thread that works on one request after the other
    make_app  the routes, the errors, and what becomes of a client that leaves

What a request names is either done or refused with an error that names it, never ignored.
Log-probabilities are raw (temperature 1) and those of the trainer's forward over the finished text,
so in a stream they come with the last chunk of a choice.

A prompt that is a string gets the assistant marker if the checkpoint is tuned to answer, unless the
request says `"raw": true`. The marker counts in usage; neither echo nor offsets show it. Token ids
are taken as they are. Messages are rendered as demonstrations are for training.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import torch

from .config import check, check_options, option, options
from .data import Demonstration, encode_demonstrations, read_conversation
from .errors import UserError
from .generate import Completion, Generator, Piece, SamplingParams, is_instructed
from .model import GPT, load
from .tokenizer import ASSISTANT, EOS, Tokenizer
from .train import choose_device, choose_dtype, mix, resolve_checkpoint

MAX_CHOICES = 128  # of a request
_GET = re.compile(r"/v1/(models|engines)(?:/(.+))?")
_POST = re.compile(r"/v1/(?:(chat)/|engines/(.+)/)?completions")

_SHARED = {"model": str, "stream": bool, "stream_options": dict, "user": str, "max_tokens": int}
_CHAT = _SHARED | {"messages": list, "max_completion_tokens": int}
_COMPLETION = _SHARED | {"prompt": object, "echo": bool, "logprobs": int, "raw": bool}
_SAMPLING = {item.name: item for item in options(SamplingParams)}
# What is not supported may still be given the value that asks for nothing.
_NEUTRAL: dict[str, Any] = {"suffix": "", "logit_bias": {}, "logprobs": False, "best_of": 1}


class ApiError(Exception):
    """An error as the client sees it."""

    def __init__(self, status: int, message: str, param: str = "", code: str = "") -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": message, "type": kind, "param": param or None, "code": code or None}
        self.status, self.body = status, {"error": error}


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if not isinstance(error, ApiError):
        logging.getLogger("uvicorn.error").error("a request failed", exc_info=error)
        return ApiError(500, "the server made a mistake, which is in its log")
    return error


def _require(condition: Any, message: str, param: str = "", code: str = "") -> None:
    if not condition:
        raise ApiError(400, message, param, code)


def _typed(name: str, value: Any, kind: type) -> Any:
    """The value, if it is of this kind: an integer is a number, too, but true is no integer."""
    if kind in (int, float):
        good = type(value) in (int, kind) and abs(value) < 1 << 63
    else:
        good = isinstance(value, kind)
    message = f"{name} must be of type {kind.__name__}, got {json.dumps(value)[:80]}"
    _require(good, message, name)
    return float(value) if kind is float else value


def _set(params: SamplingParams, name: str, value: Any) -> SamplingParams:
    """The parameters with this one as a request has it."""
    item = _SAMPLING[name]
    values = value if item.many and isinstance(value, list) else [value]
    values = tuple(_typed(name, v, item.type) for v in values)
    try:
        return replace(params, **{name: values if item.many else values[0]})
    except UserError as error:
        raise ApiError(400, str(error).replace(item.flag, name), name) from error


def _fields(body: bytes, known: dict[str, type]) -> tuple[dict[str, Any], SamplingParams]:
    """What a body says: the fields that are `known`, and the sampling's. Null says nothing."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body must be JSON: {error}") from error
    _require(isinstance(fields, dict), "the body must be a JSON object")
    given, params = {}, SamplingParams(seed=secrets.randbits(62))
    for name, value in fields.items():
        if value is None:
            continue
        if name in known:
            given[name] = _typed(name, value, known[name])
        elif name in _SAMPLING:
            params = _set(params, name, value)
        elif name not in _NEUTRAL or value != _NEUTRAL[name]:
            raise ApiError(400, f"{name} is not supported", name, "unsupported_parameter")
    return given, params


# (index of a choice, what a step added to its text, how it ended)
_Part = tuple[int, str, dict[str, Any] | None]


class _Ask:
    """A request for completions or chat: what it asks for, and the JSON of its answer.

    Raises:
        ApiError: it asks for what cannot be, or for what is not supported.
    """

    def __init__(self, engine: _Engine, body: bytes, chat: bool, path: str | None) -> None:
        self.engine, self.chat = engine, chat
        given, params = _fields(body, _CHAT if chat else _COMPLETION)
        names = [name for name in (path, given.get("model")) if name is not None]
        _require(names, "model is missing", "model")
        self.model = [engine.known(name) for name in names][0]
        self.stream, extra = given.get("stream", False), given.get("stream_options", {})
        _require(self.stream or not extra, "stream_options needs stream: true", "stream_options")
        self.usage = _typed("include_usage", extra.pop("include_usage", False), bool)
        _require(not extra, f"stream_options has unknown {[*extra]}", "stream_options")
        _require(len(params.stop) <= 4, "stop takes at most 4 strings", "stop")
        self.echo, self.top = given.get("echo", False), given.get("logprobs")
        _require(self.top in (None, *range(6)), "logprobs must be in 0 .. 5", "logprobs")
        known = all(0 <= id < engine.vocab_size for id in params.stop_token_ids)
        _require(known, f"stop_token_ids must be in 0 .. {engine.vocab_size - 1}", "stop_token_ids")

        field, self.n = "messages" if chat else "prompt", params.n
        _require(field in given, f"{field} is missing", field)
        encode = engine.encode_chat if chat else engine.encode
        self.prompts = encode(given[field], given.get("raw", False))
        self.choices = range(len(self.prompts) * self.n)
        _require(len(self.choices) <= MAX_CHOICES, f"at most {MAX_CHOICES} choices", "n")
        self.given, self.sampled = sum(len(ids) for ids, _ in self.prompts), 0  # tokens
        _require(
            len({"max_tokens", "max_completion_tokens"} & given.keys()) < 2,
            "max_tokens twice",
            "max_tokens",
        )
        limit = given.get("max_completion_tokens", given.get("max_tokens", None if chat else 16))
        self.params: list[SamplingParams] = []
        for i, (ids, _) in enumerate(self.prompts):
            room = engine.context - len(ids)
            tokens = max(room, 1) if limit is None else limit
            message = f"a prompt of {len(ids)} and a response of {tokens} tokens exceed the context"
            message += f" of {engine.context} tokens"
            _require(tokens <= room, message, field, "context_length_exceeded")
            if tokens or not self.echo:  # an echo alone samples nothing
                own = replace(params, seed=mix(params.seed, i) if i else params.seed)
                self.params.append(_set(own, "max_tokens", tokens))

    def steps(self) -> Iterator[list[_Part]]:
        """The answer, step by step; it computes, so it is for the engine's thread."""
        prompts, decode = [ids for ids, _ in self.prompts], self.engine.tokenizer.decode
        echoes = {i: decode(self.prompts[i // self.n][1]) for i in self.choices if self.echo}
        steps: Iterable = self.engine.generator.follow(prompts, self.params)
        if not self.params:
            steps = [[Piece(i, "", Completion([], [], [], "length", "")) for i in self.choices]]
        for pieces in steps:
            parts: list[_Part] = []
            for i, text, completion, *_ in pieces:
                end = self._end(i, completion) if completion else None
                parts.append((i, echoes.pop(i, "") + text, end))
            yield parts

    def _end(self, i: int, completion: Completion) -> dict[str, Any]:
        self.sampled += len(completion.token_ids)
        logprobs = None if self.top is None else self._logprobs(i, completion.token_ids)
        return {"logprobs": logprobs, "finish_reason": completion.finish_reason}

    def _logprobs(self, i: int, sampled: list[int]) -> dict[str, Any]:
        (prompt, shown), tokenizer = self.prompts[i // self.n], self.engine.tokenizer
        begin = 0 if self.echo else len(prompt)
        rows = self.engine.logprobs(prompt + sampled, begin, self.top or 0)
        if self.echo:
            del rows[len(shown) : len(prompt)]  # the marker
        specials = {tokenizer.eos_id: EOS, tokenizer.assistant_id: ASSISTANT}
        stream, offset, offsets = tokenizer.stream(), 0, []
        for id, *_ in rows:
            offsets.append(offset)
            offset += len(stream.feed(id))

        def name(id: int) -> str:
            text = tokenizer.token_bytes(id).decode("utf-8", "backslashreplace")
            return text or specials.get(id, f"<|{id}|>")

        return {
            "tokens": [name(id) for id, _, _ in rows],
            "token_logprobs": [x for _, x, _ in rows],
            "top_logprobs": [top and {name(id): x for id, x in top} for _, _, top in rows],
            "text_offset": offsets,
        }

    def _head(self) -> dict[str, Any]:
        kind = "chat.completion" + ".chunk" * self.stream if self.chat else "text_completion"
        id = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}"
        return {"id": id, "object": kind, "created": int(time.time()), "model": self.model}

    def _usage(self) -> dict[str, Any]:
        counts = {"prompt_tokens": self.given, "completion_tokens": self.sampled}
        return {"usage": {**counts, "total_tokens": self.given + self.sampled}}

    async def whole(self, answer: AsyncIterator[list[_Part]]) -> dict[str, Any]:
        """The answer as one object."""
        texts, ends = [""] * len(self.choices), [{}] * len(self.choices)
        async for parts in answer:
            for i, text, end in parts:
                texts[i] += text
                ends[i] = end or {}
        choices = []
        for i, text in enumerate(texts):
            message = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": message} if self.chat else {"text": text}
            choices.append({"index": i, **content, **ends[i]})
        return self._head() | {"choices": choices} | self._usage()

    async def events(self, answer: AsyncIterator[list[_Part]]) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        head = self._head() | ({"usage": None} if self.usage else {})

        def event(body: dict[str, Any]) -> str:
            return f"data: {json.dumps(body)}\n\n"

        def chunk(i: int, delta: dict, end: dict | None = None) -> str:
            content = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
            end = end or {"logprobs": None, "finish_reason": None}
            return event(head | {"choices": [{"index": i, **content, **end}]})

        try:
            for i in self.choices if self.chat else ():
                yield chunk(i, {"role": "assistant", "content": ""})
            async for parts in answer:
                for i, text, end in parts:
                    if text:
                        yield chunk(i, {"content": text})
                    if end:
                        yield chunk(i, {}, end)
            if self.usage:
                yield event(head | {"choices": []} | self._usage())
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield event(_as_api_error(error).body)


class _Engine:
    """A checkpoint under its names, and the one thread that computes."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, names: Sequence[str]) -> None:
        self.model, self.tokenizer, self.names = model.eval(), tokenizer, list(names)
        self.generator, self.context = Generator(model, tokenizer), model.config.context
        self.vocab_size, self.created = model.config.vocab_size, int(time.time())
        self.stopping: Callable[[], bool] = lambda: False
        self._thread = ThreadPoolExecutor(1, "generate")

    def known(self, name: str) -> str:
        """The name, perhaps unquoted, if it is one of the model's."""
        for spelling in (name, unquote_plus(name)):
            if spelling in self.names:
                return spelling
        message = f"there is no model {name!r}, but {', '.join(self.names)}"
        raise ApiError(404, message, "model", "model_not_found")

    def encode(self, prompt: Any, raw: bool) -> list[tuple[list[int], list[int]]]:
        """(ids, ids without the marker) of a text, of token ids, or of each of several."""
        many = isinstance(prompt, list) and prompt and type(prompt[0]) is not int
        pairs, marked = [], is_instructed(self.model) and not raw
        for item in prompt if many else [prompt]:
            ids = self.tokenizer.encode(item) if isinstance(item, str) else item
            good = isinstance(ids, list) and all(type(id) is int for id in ids)
            _require(good, "prompt must be a string, token ids or a list of either", "prompt")
            known = all(0 <= id < self.vocab_size for id in ids)
            _require(known, f"token ids must be in 0 .. {self.vocab_size - 1}", "prompt")
            marker = self.tokenizer.prompt_ids("") if marked and ids is not item else []
            _require(ids + marker, "a prompt needs at least one token", "prompt")
            pairs.append((ids + marker, ids))
        return pairs

    def encode_chat(self, messages: list, raw: bool) -> list[tuple[list[int], list[int]]]:
        """The same of a conversation, which the assistant is to go on with."""
        fields = {k for m in messages if isinstance(m, dict) for k in m if m[k] is not None}
        unknown = ", ".join(sorted(fields - {"role", "content"}))
        _require(not unknown, f"messages with {unknown} are not supported", "messages")
        try:
            said = Demonstration(tuple(read_conversation(messages)), {})
        except UserError as error:
            raise ApiError(400, str(error), "messages") from error
        # How long it may be depends on the response.
        ((ids, _),) = encode_demonstrations([said], self.tokenizer, sys.maxsize, "error")
        ids += self.tokenizer.prompt_ids("")
        return [(ids, ids)]

    @torch.no_grad()
    def logprobs(self, ids: list[int], begin: int, top: int) -> list[tuple]:
        """(id, its log-probability, those of it and of the `top` likeliest) of ids[begin:].

        A text's first token has no log-probability: None.
        """
        tokens = torch.tensor(ids, device=self.model.embed.device)
        starts = torch.tensor([0, len(ids)], dtype=torch.int32, device=tokens.device)
        hidden = self.model.hidden(tokens, starts, max_seqlen=len(ids))[max(begin - 1, 0) : -1]
        logprobs = self.model.logits(hidden).log_softmax(-1)
        rows: list[tuple] = [(ids[0], None, None)] if begin == 0 else []
        for id, row in zip(ids[max(begin, 1) :], logprobs, strict=True):
            own, best = row[id].item(), row.topk(min(top, len(row)))
            likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            rows.append((id, own, [*likeliest, (id, own)]))
        return rows

    async def answer(
        self, ask: _Ask, gone: Callable[[], Awaitable[bool]]
    ) -> AsyncIterator[list[_Part]]:
        """The steps of an answer, when its turn has come; they end when the client is gone."""
        loop, items = asyncio.get_running_loop(), asyncio.Queue()
        left = threading.Event()

        def tell(item: Any) -> None:
            if not left.is_set():
                loop.call_soon_threadsafe(items.put_nowait, item)

        def work() -> None:
            try:
                with closing(ask.steps()) as steps:
                    while not left.is_set() and (step := next(steps, None)) is not None:
                        tell(step)
                        if self.stopping():
                            raise ApiError(503, "the server is shutting down")
                tell(None)
            except Exception as error:
                tell(error)

        self._thread.submit(work)
        try:
            while (item := await items.get()) is not None and not await gone():
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            left.set()


def make_app(engine: _Engine, api_key: str = "") -> Callable:
    """The ASGI application. With a key, every request but /health must bear it."""
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response, StreamingResponse

    def reply(body: dict[str, Any], status: int = 200) -> Response:
        # A client that tries again may reach another server after 503, but the same bug after 500.
        headers = {503: {"retry-after": "1"}, 500: {"x-should-retry": "false"}}.get(status)
        return Response(json.dumps(body), status, headers, "application/json")

    async def respond(request: Request) -> Response:
        path = request.scope["path"]
        if path == "/health":
            return reply({"status": "ok"})
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        right = secrets.compare_digest(key.encode("latin-1"), api_key.encode())
        if api_key and not (right and scheme.lower() == "bearer"):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        if request.method == "GET" and (found := _GET.fullmatch(path)):
            return reply(describe(*found.groups()))
        if request.method == "POST" and (found := _POST.fullmatch(path)):
            return await generate(request, *found.groups())
        raise ApiError(404, f"there is no {request.method} {path}")

    def describe(kind: str, name: str | None) -> dict[str, Any]:
        about: dict[str, Any] = {"object": "model", "owned_by": "instructcore"}
        if kind == "engines":
            about = {"object": "engine", "owner": "instructcore", "ready": True}
        cards = {n: {"id": n, "created": engine.created, **about} for n in engine.names}
        return cards[engine.known(name)] if name else {"object": "list", "data": [*cards.values()]}

    async def generate(request: Request, chat: str | None, name: str | None) -> Response:
        ask = _Ask(engine, await request.body(), bool(chat), name)
        answer = engine.answer(ask, request.is_disconnected)
        if not ask.stream:
            return reply(await ask.whole(answer))
        headers = {"content-type": "text/event-stream", "cache-control": "no-cache"}
        return StreamingResponse(ask.events(answer), headers=headers)

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        request, begin = Request(scope, receive), time.perf_counter()
        try:
            response = await respond(request)
        except ClientDisconnect:
            return
        except Exception as exception:
            error = _as_api_error(exception)
            response = reply(error.body, error.status)
        response.headers["x-request-id"] = secrets.token_hex(12)
        response.headers["openai-processing-ms"] = f"{1000 * (time.perf_counter() - begin):.0f}"
        await response(scope, receive, send)

    return app


@dataclass(frozen=True)
class ServeConfig:
    """Settings of `instructcore serve`."""

    checkpoint: str = option("", "a checkpoint, run or quickstart", positional=True, required=True)
    host: str = option("127.0.0.1", "address to listen on, 0.0.0.0 = all of this machine's")
    port: int = option(8000, "port to listen on, 0 = any free one", range="[0, 65535]")
    api_key: str = option("", "what clients must send as their API key; not given: nothing")
    alias: tuple[str, ...] = option(
        ("text-davinci-003",), "names to answer to besides the checkpoint's own", metavar="NAME"
    )
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "dtype to compute in", choices=("auto", "float32", "bfloat16"))

    def __post_init__(self) -> None:
        check_options(self)
        check(bool(self.checkpoint), "serve needs a checkpoint")


def run(config: ServeConfig) -> None:
    """Serves until Ctrl-C, which cuts short the answers under way."""
    import uvicorn

    path, device = resolve_checkpoint(config.checkpoint), choose_device(config.device)
    try:
        listener = socket.create_server((config.host, config.port))
    except OSError as error:
        where = f"{config.host}, port {config.port}"
        raise UserError(f"cannot listen on {where}: {error.strerror}") from error
    with listener:
        model = load(path, dtype=choose_dtype(config.dtype, device), device=device)
        names = dict.fromkeys((Path(config.checkpoint).resolve().name, *config.alias))
        engine = _Engine(model, Tokenizer.load(path), [*names])
        app = make_app(engine, config.api_key)
        settings = uvicorn.Config(app, log_level="warning", lifespan="off", access_log=False)
        server = uvicorn.Server(settings)
        engine.stopping = lambda: server.should_exit
        address = f"http://{config.host}:{listener.getsockname()[1]}/v1"
        print(f"serving {', '.join(names)} at {address} (Ctrl-C stops)", flush=True)
        with model.frozen():
            server.run(sockets=[listener])
