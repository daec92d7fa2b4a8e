"""OpenAI's wire format: what the JSON of a request asks for, and the JSON of its answer.

    Checkpoint  what is served under which names, and how texts and messages become its tokens
    Ask         a request for completions or chat, and its answer: whole, or as events
    Choice      one response of an answer: each piece of it becomes the JSON of what it adds

What a request names is either done or refused with an error that names it, never ignored.
Log-probabilities are raw (temperature 1), those of the trainer's forward.

A prompt that is a string gets the assistant marker if the checkpoint is tuned to answer, unless the
request says `"raw": true`. The marker counts in usage; neither echo nor offsets show it. Token ids
are taken as they are. Messages are rendered as demonstrations are for training.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from itertools import chain, repeat
from statistics import fmean
from typing import Any
from urllib.parse import unquote_plus

from .config import options
from .data import encode_conversation, read_conversation
from .errors import UserError
from .generate import is_instructed
from .scheduler import Piece, Request, SamplingParams, Scheduler
from .train import mix

MAX_CHOICES = 128  # that a request makes, whether it shows them or not
MAX_STOP = 256  # characters of a stop string

# What a request may say, and of which type it must be; (type,) stands for one or a list of them.
_SAMPLING = {o.name: (o.type,) if o.many else o.type for o in options(SamplingParams)}
_SHARED = {"model": str, "stream": bool, "stream_options": dict, "user": str, "logit_bias": dict}
_SHARED |= {"return_token_ids": bool} | _SAMPLING
_CHAT = {"messages": list, "max_completion_tokens": int, "logprobs": bool, "top_logprobs": int}
_COMPLETION = {"prompt": object, "echo": bool, "logprobs": int, "best_of": int, "raw": bool}
_MESSAGE = {"role": str, "content": object}
_DEFAULTS = {"n": 1, "stop": (), "stream": False, "echo": False, "raw": False, "logprobs": None}
_MOST = {int: (1 << 63) - 1, float: 100}  # of a number's size
# What is not supported may still be given the value that asks for nothing.
_NEUTRAL: dict[str, Any] = {"suffix": "", "tools": [], "tool_choice": "none", "store": False}
_NEUTRAL |= {"response_format": {"type": "text"}, "logprobs": False, "best_of": 1}

# Errors that are not the request's: their type, and what the client is to do. One that tries again
# may reach another server after 503, but the same bug after 500.
_AGAIN = {"retry-after": "1"}
_ERRORS = {429: ("rate_limit_error", _AGAIN), 503: ("server_error", _AGAIN)}
_ERRORS |= {500: ("server_error", {"x-should-retry": "false"})}


class ApiError(Exception):
    """An error as the client sees it."""

    def __init__(self, status: int, message: str, param: str = "", code: str = "") -> None:
        super().__init__(message)
        kind, self.headers = _ERRORS.get(status, ("invalid_request_error", {}))
        error = {"message": message, "type": kind, "param": param or None, "code": code or None}
        self.status, self.body = status, {"error": error}


def as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    logging.getLogger("uvicorn.error").error("a request failed", exc_info=error)
    return ApiError(500, "the server made a mistake, which is in its log")


def require(condition: Any, message: str, param: str = "", code: str = "") -> None:
    if not condition:
        raise ApiError(400, message, param, code)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value, if it is of this kind: an integer is a number, too, but true is no integer."""
    if isinstance(kind, tuple):
        return tuple(_typed(name, v, *kind) for v in (value if type(value) is list else [value]))
    good = type(value) in (int, kind) if kind in _MOST else isinstance(value, kind)
    require(good, f"{name} must be of type {kind.__name__}, got {json.dumps(value)[:80]}", name)
    most = _MOST.get(kind, 0)
    require(not most or abs(value) <= most, f"{name} must be in -{most} .. {most}", name)
    return float(value) if kind is float else value


def _given(fields: Any, known: dict[str, Any], within: str = "") -> dict[str, Any]:
    """What a body says, or an object in it. Null says nothing."""
    require(isinstance(fields, dict), f"{within or 'the body'} must be a JSON object", within)
    given = {}
    for key, value in fields.items():
        name = f"{within}.{key:.80}" if within else key[:80]
        if key in known and value is not None:
            given[key] = _typed(name, value, known[key])
        elif value not in (None, _NEUTRAL.get(key)):
            raise ApiError(400, f"{name} is not supported", name, "unsupported_parameter")
    return given


class Checkpoint:
    """What is served, under its names."""

    def __init__(self, scheduler: Scheduler, names: Sequence[str]) -> None:
        self.scheduler, self.names, self.created = scheduler, list(names), int(time.time())
        self.tokenizer, self.context = scheduler.tokenizer, scheduler.model.config.context
        self.instructed = is_instructed(scheduler.model)
        self.marker = self.tokenizer.prompt_ids("") if self.instructed else []
        longest = max(len(self.tokenizer.token_bytes(i)) for i in range(self.tokenizer.vocab_size))
        self.most_text = self.context * longest  # characters: each has a byte at least

    def known(self, name: str) -> str:
        """The name, perhaps unquoted, if it is one of the model's."""
        name = name if name in self.names else unquote_plus(name)
        if name not in self.names:
            message = f"there is no model {name!r:.80}, but {', '.join(self.names)}"
            raise ApiError(404, message, "model", "model_not_found")
        return name

    def cards(self, kind: str, name: str | None) -> dict[str, Any]:
        """A description under this name, or under each: of kind "models" or "engines"."""
        about = {"object": kind.removesuffix("s"), "owned_by": "instructcore", "ready": True}
        about |= {"created": self.created, "context": self.context, "instructed": self.instructed}
        if name:
            return {"id": self.known(name), **about}
        return {"object": "list", "data": [{"id": name, **about} for name in self.names]}

    def encode(self, prompt: Any, raw: bool) -> list[tuple[list[int], list[int]]]:
        """(ids, ids without the marker) of a text, of token ids, or of each of several."""
        many = isinstance(prompt, list) and prompt and type(prompt[0]) is not int
        pairs = []
        for item in prompt if many else [prompt]:
            ids, marker = item, []
            if isinstance(item, str):
                self._check_length(item, "prompt")
                ids, marker = self.tokenizer.encode(item), [] if raw else self.marker
            good = isinstance(ids, list) and all(type(id) is int for id in ids)
            require(good, "prompt must be a string, token ids or a list of either", "prompt")
            pairs.append((ids + marker, ids))
        return pairs

    def encode_chat(self, messages: list) -> list[tuple[list[int], list[int]]]:
        """The same of a conversation, which the assistant is to go on with."""
        said = [_given(m, _MESSAGE, f"messages[{i}]") for i, m in enumerate(messages)]
        turns = read_conversation(said)
        self._check_length("".join(turn.text for turn in turns), "messages")
        ids = encode_conversation(turns, self.tokenizer, marked=self.instructed)
        return [(ids, ids)]

    def _check_length(self, text: str, param: str) -> None:
        """Refuses what cannot fit before work is done on it."""
        message = f"{len(text)} characters exceed the context of {self.context} tokens"
        require(len(text) <= self.most_text, message, param, "context_length_exceeded")


class Choice:
    """One response: each piece becomes what it adds."""

    def __init__(self, ask: Ask, index: int, request: Request, shown: list[int]) -> None:
        self.ask, self.index, self.request, self.shown = ask, index, request, shown
        self._stream = ask.tokenizer.stream(() if ask.echo else request.prompt)
        self._begun, self._offset = False, 0

    def take(self, piece: Piece) -> dict[str, Any]:
        """What a piece adds: text, logprobs and finish_reason, and ids where they are wanted."""
        ask, request, text = self.ask, self.request, piece.text
        rows = _rows(piece.token_ids, piece.logprobs, piece.top_logprobs)
        begins, self._begun = not self._begun, True
        if begins and ask.echo:
            text = ask.tokenizer.decode(self.shown) + text
            tops = request.prompt_top_logprobs if ask.top else ()
            rows = chain(_rows(self.shown, request.prompt_logprobs, tops), rows)
        reason = piece.completion and piece.completion.finish_reason
        part: dict[str, Any] = {"text": text, "logprobs": None, "finish_reason": reason}
        if ask.top is not None:
            part["logprobs"] = self._for_chat(rows) if ask.chat else self._logprobs(rows)
        if ask.return_ids:
            part |= {"prompt_token_ids": request.prompt} if begins else {}
            part["token_ids"] = list(piece.token_ids)
        return part

    def _name(self, id: int) -> str:
        """A token as text; where its bytes are none, marked as OpenAI does."""
        name, spelt = self.ask.tokenizer.token_text(id), self.ask.tokenizer.token_bytes(id)
        return f"bytes:{name}" if spelt and name.encode() != spelt else name

    def _logprobs(self, rows: Iterable[tuple]) -> dict[str, Any]:
        table = []
        for id, logprob, top in rows:
            name = self._name(id)
            top = {self._name(other): x for other, x in top.items()} | {name: logprob}
            table.append((name, logprob, None if logprob is None else top, self._offset))
            self._offset += len(self._stream.feed(id))
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return dict(zip(names, [*zip(*table, strict=True)] or [()] * 4, strict=True))

    def _for_chat(self, rows: Iterable[tuple]) -> dict[str, Any]:
        tokenizer = self.ask.tokenizer

        def entry(id: int, logprob: float) -> dict[str, Any]:
            spelt = list(tokenizer.token_bytes(id)) or None
            return {"token": tokenizer.token_text(id), "logprob": logprob, "bytes": spelt}

        content = [
            entry(id, logprob) | {"top_logprobs": [entry(*item) for item in top.items()]}
            for id, logprob, top in rows
        ]
        return {"content": content, "refusal": None}


def _rows(ids: Sequence, logprobs: Sequence, tops: Sequence) -> Iterator[tuple]:
    """(id, log-probability, those of the likeliest) of each token; JSON knows no infinity."""
    for id, logprob, top in zip(ids, logprobs, tops or repeat({}), strict=False):
        finite = {other: max(x, -9999.0) for other, x in (top or {}).items()}
        yield id, logprob and max(logprob, -9999.0), finite


Part = tuple[Choice, Piece]


class Ask:
    """A request for completions or chat: what it asks for, and the JSON of its answer.

    `choices` have the requests that the scheduler is to complete. What comes of them, one (choice,
    piece) after the other, makes the answer.

    Raises:
        ApiError: it asks for what cannot be, or for what is not supported.
    """

    def __init__(self, served: Checkpoint, body: bytes, chat: object, path: str | None) -> None:
        self.tokenizer, self.chat = served.tokenizer, bool(chat)
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body must be JSON: {error}") from error
        given = _DEFAULTS | _given(fields, _SHARED | (_CHAT if chat else _COMPLETION))
        names = [name for name in (path, given.get("model")) if name is not None]
        require(names, "model is missing", "model")
        self.model = [served.known(name) for name in names][0]

        self.echo, self.stream = given["echo"], given["stream"]
        self.return_ids, options = given.get("return_token_ids"), given.get("stream_options", {})
        require(self.stream or not options, "stream_options needs stream: true", "stream_options")
        self.usage = _given(options, {"include_usage": bool}, "stream_options").get("include_usage")

        self.shown, self.made = given["n"], given.get("best_of", given["n"])  # per prompt
        require(self.made >= self.shown, f"best_of must be at least n, got {self.made}", "best_of")
        require(self.made == self.shown or not self.stream, "a stream has no best_of", "best_of")

        # How many of the likeliest tokens to show; None: no log-probabilities at all.
        self.top, name, most = given["logprobs"], "logprobs", 5
        if self.chat:
            wanted, name, most = bool(self.top), "top_logprobs", 20
            require(wanted or not given.get(name), f"{name} needs logprobs: true", name)
            self.top = given.get(name, 0) if wanted else None
        require(self.top is None or 0 <= self.top <= most, f"{name} must be in 0 .. {most}", name)

        field = "messages" if chat else "prompt"
        require(field in given, f"{field} is missing", field)
        try:
            self.choices = self._choices(served, given, field)
        except UserError as error:  # it names a setting, perhaps as a flag, or is about the prompt
            name, _, rest = str(error).lstrip("-").partition(" ")
            name = name.replace("-", "_")
            param = name if name in _SHARED else field
            raise ApiError(400, f"{name} {rest:.300}", param) from error

    def _choices(self, served: Checkpoint, given: dict[str, Any], field: str) -> list[Choice]:
        """What is to be made: `made` responses to one prompt after the other."""
        said, stop, bias = given[field], given["stop"], given.get("logit_bias", {})
        pairs = served.encode_chat(said) if self.chat else served.encode(said, given["raw"])
        require(len(pairs) * self.made <= MAX_CHOICES, f"at most {MAX_CHOICES} responses", "n")
        few = len(stop) <= 4 and all(len(string) <= MAX_STOP for string in stop)
        require(few, f"stop takes at most 4 strings of {MAX_STOP} characters", "stop")
        limits = [given[name] for name in ("max_completion_tokens", "max_tokens") if name in given]
        require(len(limits) < 2, "max_tokens twice", "max_tokens")
        known = all(id.isascii() and id.isdigit() and len(id) < 10 for id in bias)
        require(known, "logit_bias must map token ids to numbers", "logit_bias")

        longest = max(len(ids) for ids, _ in pairs)
        room = served.context - longest
        (tokens,) = limits or [max(room, 1) if self.chat else 16]
        message = f"{longest} tokens and {tokens} to come exceed the context of {served.context}"
        require(tokens <= room, message, field, "context_length_exceeded")
        require(tokens or self.echo, "max_tokens may be 0 only with echo", "max_tokens")

        settings = {name: given[name] for name in given.keys() & _SAMPLING.keys()}
        settings |= {"n": self.made, "top_logprobs": self.top or 0, "max_tokens": tokens}
        settings["prompt_logprobs"] = self.echo and (self.top is not None or tokens == 0)
        settings["logit_bias"] = {int(id): _typed("logit_bias", b, float) for id, b in bias.items()}
        first = given.get("seed", secrets.randbits(62))
        choices: list[Choice] = []
        for ids, shown in pairs:
            settings["seed"] = mix(first, len(choices)) if choices else first
            requests = served.scheduler.requests(ids, SamplingParams(**settings))
            choices += [Choice(self, len(choices) + i, r, shown) for i, r in enumerate(requests)]
        return choices

    async def whole(self, parts: AsyncIterator[Part]) -> dict[str, Any]:
        """The answer as one object."""
        async for _ in parts:
            pass  # the requests keep what has come to them
        made = self.choices
        if self.made > self.shown:  # the likeliest per token come first
            mean = {choice: fmean(choice.request.logprobs or [0.0]) for choice in made}
            made = sorted(made, key=lambda choice: (choice.index // self.made, -mean[choice]))
        choices = []
        for choice in (choice for i, choice in enumerate(made) if i % self.made < self.shown):
            c = choice.request.completion
            part = choice.take(Piece(0, c.text, c, c.token_ids, c.logprobs, c.top_logprobs or ()))
            if self.chat:
                text = part.pop("text")
                part["message"] = {"role": "assistant", "content": text, "refusal": None}
            choices.append({"index": len(choices)} | part)
            await asyncio.sleep(0)  # there are others to serve meanwhile
        return self._head() | {"choices": choices} | self._usage()

    async def events(self, part: Part | None, parts: AsyncIterator[Part]) -> AsyncIterator[str]:
        """The answer as server-sent events, from its first part on."""
        head = self._head() | ({"usage": None} if self.usage else {})

        def event(*choices: dict[str, Any], **usage: Any) -> str:
            return f"data: {json.dumps(head | {'choices': choices} | usage)}\n\n"

        def chunk(choice: Choice, delta: dict[str, Any], **rest: Any) -> str:
            empty = {"index": choice.index, "logprobs": None, "finish_reason": None}
            said = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
            return event(empty | said | rest)

        try:
            for choice in self.choices if self.chat else ():
                yield chunk(choice, {"role": "assistant", "content": ""})
            while part:
                choice, piece = part
                added = choice.take(piece)
                text, reason = added.pop("text"), added.pop("finish_reason")
                if text or added["logprobs"] or len(added) > 1:
                    yield chunk(choice, {"content": text}, **added)
                if reason:
                    yield chunk(choice, {}, finish_reason=reason)
                part = await anext(parts, None)
            if self.usage:
                yield event(**self._usage())
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield f"data: {json.dumps(as_api_error(error).body)}\n\n"

    def _head(self) -> dict[str, Any]:
        kind = "chat.completion" + ".chunk" * self.stream if self.chat else "text_completion"
        id = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}"
        return {"id": id, "object": kind, "created": int(time.time()), "model": self.model}

    def _usage(self) -> dict[str, Any]:
        given = sum(len(choice.request.prompt) for choice in self.choices[:: self.made])
        sampled = sum(len(choice.request.logprobs) for choice in self.choices)
        counts = {"prompt_tokens": given, "completion_tokens": sampled}
        return {"usage": {**counts, "total_tokens": given + sampled}}
