"""OpenAI's wire format: what the JSON of a request asks for, and the JSON of its answer.

    Checkpoint  what is served under which names, and how texts and messages become its tokens
    Ask         a request for completions or chat, and its answer: whole, or as events
    _Choice     one response of an answer: each piece of it becomes the JSON of what it adds

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
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import chain, repeat
from typing import Any
from urllib.parse import unquote_plus

from .config import options
from .data import Demonstration, encode_demonstrations, read_conversation
from .errors import UserError
from .generate import is_instructed
from .model import GPT
from .scheduler import Completion, Piece, Request, SamplingParams
from .tokenizer import ASSISTANT, EOS, Tokenizer
from .train import mix

MAX_CHOICES = 128  # that a request makes, whether it shows them or not
MAX_STOP = 256  # characters of a stop string
COLDEST = 1e-6  # temperature: below it is 0, because logits divided by it overflow

_SHARED = {"model": str, "stream": bool, "stream_options": dict, "user": str, "max_tokens": int}
_SHARED |= {"logit_bias": dict, "return_token_ids": bool}
_CHAT = {"messages": list, "max_completion_tokens": int, "logprobs": bool, "top_logprobs": int}
_CHAT |= _SHARED
_COMPLETION = {"prompt": object, "echo": bool, "logprobs": int, "best_of": int, "raw": bool}
_COMPLETION |= _SHARED
_SAMPLING = {item.name: item for item in options(SamplingParams)}
# Beyond these the sampler's float32 overflows, and one request must not spoil the others' step.
_BOUNDS = {"temperature": (0, 100), "repetition_penalty": (0.01, 100)}
_BOUNDS |= {"presence_penalty": (-100, 100), "frequency_penalty": (-100, 100)}
# What is not supported may still be given the value that asks for nothing.
_NEUTRAL: dict[str, Any] = {"suffix": "", "tools": [], "tool_choice": "none"}
_NEUTRAL |= {"response_format": {"type": "text"}, "logprobs": False, "best_of": 1}


class ApiError(Exception):
    """An error as the client sees it."""

    def __init__(self, status: int, message: str, param: str = "", code: str = "") -> None:
        super().__init__(message)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if status == 429 else kind
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


def _typed(name: str, value: Any, kind: type) -> Any:
    """The value, if it is of this kind: an integer is a number, too, but true is no integer."""
    if kind in (int, float):
        good = type(value) in (int, kind) and abs(value) < 1 << 63
    else:
        good = isinstance(value, kind)
    require(good, f"{name} must be of type {kind.__name__}, got {json.dumps(value)[:80]}", name)
    return float(value) if kind is float else value


def _set(params: SamplingParams, name: str, value: Any) -> SamplingParams:
    """The parameters with this one as a request has it."""
    item = _SAMPLING[name]
    values = value if item.many and isinstance(value, list) else [value]
    values = tuple(_typed(name, v, item.type) for v in values)
    if name == "temperature" and 0 < values[0] < COLDEST:
        values = (0.0,)
    if name in _BOUNDS:
        (low, high), (number,) = _BOUNDS[name], values
        require(low <= number <= high, f"{name} must be in [{low}, {high}], got {number}", name)
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
    require(isinstance(fields, dict), "the body must be a JSON object")
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


class Checkpoint:
    """What is served, under its names."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, names: Sequence[str]) -> None:
        self.tokenizer, self.names, self.created = tokenizer, list(names), int(time.time())
        self.context, self.vocab_size = model.config.context, model.config.vocab_size
        self.instructed = is_instructed(model)
        self.longest = max(len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size))

    def known(self, name: str) -> str:
        """The name, perhaps unquoted, if it is one of the model's."""
        for spelling in (name, unquote_plus(name)):
            if spelling in self.names:
                return spelling
        message = f"there is no model {name!r}, but {', '.join(self.names)}"
        raise ApiError(404, message, "model", "model_not_found")

    def cards(self, kind: str, name: str | None) -> dict[str, Any]:
        """A description under this name, or under each: of kind "models" or "engines"."""
        about: dict[str, Any] = {"object": "model", "owned_by": "instructcore"}
        if kind == "engines":
            about = {"object": "engine", "owner": "instructcore", "ready": True}
        about |= {"created": self.created, "context": self.context, "instructed": self.instructed}
        if name:
            return {"id": self.known(name), **about}
        return {"object": "list", "data": [{"id": name, **about} for name in self.names]}

    def encode(self, prompt: Any, raw: bool) -> list[tuple[list[int], list[int]]]:
        """(ids, ids without the marker) of a text, of token ids, or of each of several."""
        many = isinstance(prompt, list) and prompt and type(prompt[0]) is not int
        pairs, marked = [], self.instructed and not raw
        for item in prompt if many else [prompt]:
            ids, marker = item, []
            if isinstance(item, str):
                self._check_length(item, "prompt")
                ids = self.tokenizer.encode(item)
                marker = self.tokenizer.prompt_ids("") if marked else []
            good = isinstance(ids, list) and all(type(id) is int for id in ids)
            require(good, "prompt must be a string, token ids or a list of either", "prompt")
            self.check_ids(ids, "prompt")
            require(ids + marker, "a prompt needs at least one token", "prompt")
            pairs.append((ids + marker, ids))
        return pairs

    def encode_chat(self, messages: list) -> list[tuple[list[int], list[int]]]:
        """The same of a conversation, which the assistant is to go on with."""
        messages = [_plain(message) for message in messages]
        fields = {k for m in messages if isinstance(m, dict) for k in m if m[k] is not None}
        unknown = ", ".join(sorted(fields - {"role", "content"}))
        require(not unknown, f"messages with {unknown} are not supported", "messages")
        try:
            said = Demonstration(tuple(read_conversation(messages)), {})
        except UserError as error:
            raise ApiError(400, str(error), "messages") from error
        self._check_length("".join(turn.text for turn in said.turns), "messages")
        # How long it may be depends on the response.
        limits, marked = (sys.maxsize, "error"), self.instructed
        ((ids, _),) = encode_demonstrations([said], self.tokenizer, *limits, marked=marked)
        ids += self.tokenizer.prompt_ids("") if marked else []
        require(ids, "messages need at least one token", "messages")
        return [(ids, ids)]

    def check_ids(self, ids: Iterable[int], param: str) -> None:
        last = self.vocab_size - 1
        require(all(0 <= i <= last for i in ids), f"ids of {param} must be in 0 .. {last}", param)

    def _check_length(self, text: str, param: str) -> None:
        """Refuses what cannot fit before work is done on it: a token has so many bytes at most."""
        message = f"{len(text)} characters exceed the context of {self.context} tokens"
        fits = len(text) <= self.context * self.longest
        require(fits, message, param, "context_length_exceeded")


def _plain(message: Any) -> Any:
    """A message whose content, if it is a list of texts, is their sum."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    texts = []
    for part in message["content"]:
        good = isinstance(part, dict) and part.keys() == {"type", "text"}
        good = good and part["type"] == "text" and isinstance(part["text"], str)
        require(good, "the parts of a message must be {type: text, text}", "messages")
        texts.append(part["text"])
    return message | {"content": "".join(texts)}


class _Choice:
    """One response: each piece becomes what it adds, and these join to the whole."""

    def __init__(self, ask: Ask, prompt: list[int], shown: list[int]) -> None:
        self.ask, self.prompt, self.shown = ask, prompt, shown
        self.completion: Completion | None = None
        self._stream, self._offset, self._begun = ask.tokenizer.stream(), 0, False

    @property
    def likelihood(self) -> float:
        """The mean log-probability of its tokens."""
        return sum(self.completion.logprobs) / max(len(self.completion.logprobs), 1)

    def take(self, request: Request, piece: Piece) -> dict[str, Any]:
        """What a piece adds: text, logprobs and finish_reason, and ids where they are wanted."""
        ask, text, self.completion = self.ask, piece.text, piece.completion
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
            part |= {"prompt_token_ids": self.prompt} if begins else {}
            part["token_ids"] = list(piece.token_ids)
        return part

    def _name(self, id: int) -> str:
        """A token as text; where its bytes are none, escaped as OpenAI does."""
        tokenizer = self.ask.tokenizer
        spelt = tokenizer.token_bytes(id)
        try:
            specials = {tokenizer.eos_id: EOS, tokenizer.assistant_id: ASSISTANT}
            return spelt.decode() or specials.get(id, f"<|{id}|>")
        except UnicodeDecodeError:
            text = spelt.decode("utf-8", "backslashreplace")
            return text if self.ask.chat else f"bytes:{text}"

    def _logprobs(self, rows: Iterable[tuple]) -> dict[str, Any]:
        names, logprobs, likeliest, offsets = [], [], [], []
        for id, logprob, top in rows:
            names.append(self._name(id))
            logprobs.append(logprob if logprob is None else _finite(logprob))
            top = {self._name(other): _finite(x) for other, x in (top or {}).items()}
            likeliest.append(None if logprob is None else top | {names[-1]: logprobs[-1]})
            offsets.append(self._offset)
            self._offset += len(self._stream.feed(id))
        part: dict[str, Any] = {"tokens": names, "token_logprobs": logprobs}
        return part | {"top_logprobs": likeliest, "text_offset": offsets}

    def _for_chat(self, rows: Iterable[tuple]) -> dict[str, Any]:
        def entry(id: int, logprob: float) -> dict[str, Any]:
            spelt = list(self.ask.tokenizer.token_bytes(id)) or None
            return {"token": self._name(id), "logprob": _finite(logprob), "bytes": spelt}

        content = [
            entry(id, logprob) | {"top_logprobs": [entry(*item) for item in top.items()]}
            for id, logprob, top in rows
        ]
        return {"content": content, "refusal": None}


def _rows(ids: Sequence, logprobs: Sequence, tops: Sequence) -> Iterator[tuple]:
    """(id, log-probability, those of the likeliest) of each token."""
    return zip(ids, logprobs, tops or repeat({}), strict=False)


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON knows no infinity


def _join(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Adds what a piece has added: texts and lists go on, the rest is set."""
    for name, value in part.items():
        if isinstance(value, dict) and name in whole:
            _join(whole[name], value)
        elif isinstance(value, str | list) and whole.get(name) is not None:
            whole[name] += value
        else:
            whole[name] = value


# What a step has added to an answer: (index of a choice, its request, a piece of it).
Parts = list[tuple[int, Request, Piece]]


class Ask:
    """A request for completions or chat: what it asks for, and the JSON of its answer.

    `prompts` are what the scheduler is to continue; the rest of its answer follows from the pieces.

    Raises:
        ApiError: it asks for what cannot be, or for what is not supported.
    """

    def __init__(self, served: Checkpoint, body: bytes, chat: bool, path: str | None) -> None:
        self.tokenizer, self.chat = served.tokenizer, chat
        # Of the engine: what answers it, and what it has added to the answer.
        self.requests: list[Request] = []
        self.parts: asyncio.Queue[Parts | Exception] = asyncio.Queue()

        given, params = _fields(body, _CHAT if chat else _COMPLETION)
        names = [name for name in (path, given.get("model")) if name is not None]
        require(names, "model is missing", "model")
        self.model = [served.known(name) for name in names][0]
        self._shape(given, params)
        bias = _bias(given.get("logit_bias", {}), served.vocab_size)
        served.check_ids(params.stop_token_ids, "stop_token_ids")
        params = replace(params, n=self.made, logit_bias=bias, top_logprobs=self.top or 0)

        field = "messages" if chat else "prompt"
        require(field in given, f"{field} is missing", field)
        raw = given.get("raw", False)
        pairs = served.encode_chat(given[field]) if chat else served.encode(given[field], raw)
        count = len(pairs) * self.made
        require(count <= MAX_CHOICES, f"at most {MAX_CHOICES} responses, got {count}", "n")
        self.choices = [_Choice(self, *pair) for pair in pairs for _ in range(self.made)]
        self.given = sum(len(ids) for ids, _ in pairs)  # tokens

        limits = ("max_completion_tokens", "max_tokens")
        require(not given.keys() >= {*limits}, "max_tokens twice", "max_tokens")
        limit = next((given[name] for name in limits if name in given), None if chat else 16)
        self.prompts: list[tuple[list[int], SamplingParams]] = []
        for i, (ids, _) in enumerate(pairs):
            room = served.context - len(ids)
            tokens = max(room, 1) if limit is None else limit
            least = 0 if self.echo else 1
            message = f"max_tokens must be at least 1, or 0 with echo, got {tokens}"
            require(tokens >= least, message, "max_tokens")
            message = f"a prompt of {len(ids)} and a response of {tokens} tokens exceed the context"
            message += f" of {served.context} tokens"
            require(tokens <= room, message, field, "context_length_exceeded")
            scored = self.echo and (self.top is not None or tokens == 0)
            seed = mix(params.seed, i * self.made) if i else params.seed
            own = replace(params, max_tokens=tokens, prompt_logprobs=scored, seed=seed)
            self.prompts.append((ids, own))

    def _shape(self, given: dict[str, Any], params: SamplingParams) -> None:
        """What the answer is to look like."""
        self.return_ids, self.echo = given.get("return_token_ids", False), given.get("echo", False)
        self.stream, extra = given.get("stream", False), dict(given.get("stream_options", {}))
        require(self.stream or not extra, "stream_options needs stream: true", "stream_options")
        self.usage = _typed("include_usage", extra.pop("include_usage", False), bool)
        require(not extra, f"stream_options has unknown {[*extra]}", "stream_options")

        require(len(params.stop) <= 4, "stop takes at most 4 strings", "stop")
        longest = max(map(len, params.stop), default=0)
        require(longest <= MAX_STOP, f"stop takes at most {MAX_STOP} characters each", "stop")

        self.shown, self.made = params.n, given.get("best_of", params.n)  # responses per prompt
        require(self.made >= self.shown, f"best_of must be at least n, got {self.made}", "best_of")
        chooses = self.made > self.shown
        require(not (chooses and self.stream), "best_of cannot choose in a stream", "best_of")

        # How many of the likeliest tokens to show; None: no log-probabilities at all.
        self.top, name, most = given.get("logprobs"), "logprobs", 5
        if self.chat:
            wanted, name, most = bool(self.top), "top_logprobs", 20
            require(wanted or not given.get(name), f"{name} needs logprobs: true", name)
            self.top = given.get(name, 0) if wanted else None
        require(self.top is None or 0 <= self.top <= most, f"{name} must be in 0 .. {most}", name)

    async def whole(self, answer: AsyncIterator[Parts]) -> dict[str, Any]:
        """The answer as one object."""
        made: list[dict[str, Any]] = [{} for _ in self.choices]
        async for parts in answer:
            for i, *piece in parts:
                _join(made[i], self.choices[i].take(*piece))
        shown = []
        for first in range(0, len(made), self.made):
            group = [*range(first, first + self.made)]
            if self.made > self.shown:  # the likeliest per token
                group.sort(key=lambda i: self.choices[i].likelihood, reverse=True)
            shown += [made[i] for i in group[: self.shown]]
        for choice in shown if self.chat else ():
            content = {"role": "assistant", "content": choice.pop("text"), "refusal": None}
            choice["message"] = content
        choices = [{"index": i, **choice} for i, choice in enumerate(shown)]
        return self._head() | {"choices": choices} | self._usage()

    async def events(self, answer: AsyncIterator[Parts]) -> AsyncIterator[str]:
        """The answer as server-sent events; an error before the first one is raised."""
        head, began = self._head() | ({"usage": None} if self.usage else {}), False

        def event(body: dict[str, Any]) -> str:
            return f"data: {json.dumps(body)}\n\n"

        def chunk(i: int, delta: dict[str, Any], **part: Any) -> str:
            text = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
            part = {"index": i, **text, "logprobs": None, "finish_reason": None} | part
            return event(head | {"choices": [part]})

        try:
            async with aclosing(answer):
                async for parts in answer:
                    for i in range(len(self.choices)) if self.chat and not began else ():
                        yield chunk(i, {"role": "assistant", "content": ""})
                    began = True
                    for i, *piece in parts:
                        part = self.choices[i].take(*piece)
                        text, reason = part.pop("text"), part.pop("finish_reason")
                        if text or part["logprobs"] or len(part) > 1:
                            yield chunk(i, {"content": text}, **part)
                        if reason:
                            yield chunk(i, {}, finish_reason=reason)
            if self.usage:
                yield event(head | {"choices": []} | self._usage())
            yield "data: [DONE]\n\n"
        except Exception as error:
            if not began:
                raise
            yield event(as_api_error(error).body)

    def _head(self) -> dict[str, Any]:
        kind = "chat.completion" + ".chunk" * self.stream if self.chat else "text_completion"
        id = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}"
        return {"id": id, "object": kind, "created": int(time.time()), "model": self.model}

    def _usage(self) -> dict[str, Any]:
        sampled = sum(len(choice.completion.token_ids) for choice in self.choices)
        counts = {"prompt_tokens": self.given, "completion_tokens": sampled}
        return {"usage": {**counts, "total_tokens": self.given + sampled}}


def _bias(given: dict[str, Any], vocab_size: int) -> dict[int, float]:
    """logit_bias: the nats that are added to the logit of a token."""
    message = f"logit_bias must map token ids in 0 .. {vocab_size - 1} to numbers in -100 .. 100"
    for id, nats in given.items():
        good = re.fullmatch("[0-9]{1,9}", id) and int(id) < vocab_size
        good = good and type(nats) in (int, float) and -100 <= nats <= 100
        require(good, message, "logit_bias")
    return {int(id): float(nats) for id, nats in given.items()}
