"""An OpenAI-compatible server, and a page to chat on: `instructcore serve CKPT`.

    Engine   the scheduler, on the one thread that computes; what waits for it, and how much may
    _Metrics  what has been counted and timed, for Prometheus
    make_app  the routes, the errors, and what becomes of a client that leaves

The event loop reads requests and writes answers (`serve_wire` says what they mean); the engine's
thread takes commands from a queue before every step and sends back what the step has added. The
requests of a client that leaves are aborted before the next step, running or waiting.
"""

from __future__ import annotations

import asyncio
import json
import queue
import re
import secrets
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, Response, StreamingResponse

from .config import check, check_options, option
from .errors import UserError
from .model import GPT, load
from .scheduler import Piece, Request, Scheduler, Stats
from .serve_wire import ApiError, Ask, Checkpoint, Choice, Part, as_api_error, require
from .tokenizer import Tokenizer
from .train import choose_device, choose_dtype, resolve_checkpoint

MAX_BODY = 8 << 20  # bytes of a request
BODY_SECONDS = 60  # until it must be here
PAGE = Path(__file__).parent / "static" / "chat.html"
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; frame-ancestors 'none'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
EVENTS = {"content-type": "text/event-stream", "cache-control": "no-cache"}

_CARDS = re.compile(r"GET /v1/(models|engines)(?:/(.+))?")
_GENERATE = re.compile(r"POST /v1/(?:(chat)/|engines/(.+)/)?completions")


@dataclass(eq=False)
class Engine:
    """A checkpoint under its names, its scheduler, and the one thread that works it."""

    model: GPT
    tokenizer: Tokenizer
    names: Sequence[str]
    max_batch: int = 64  # most choices computed at once
    max_queue: int = 256  # most that wait; what comes then is turned away

    def __post_init__(self) -> None:
        self.model.eval()
        self.draining = False
        self._owners: dict[Request, Choice] = {}  # the choices that run or wait
        # What follows is the thread's own; but `stats`, replaced as a whole, may be looked at.
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._renew()
        self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
        self._thread.start()

    # -- on the event loop ------------------------------------------------------------------------

    @property
    def load(self) -> int:
        """How many choices run or wait."""
        return len(self._owners)

    @contextmanager
    def at_work(self, ask: Ask) -> Iterator[None]:
        """What a request asks for is made while this is open; the rest of it is then given up."""
        if self.draining:
            raise ApiError(503, "the server is shutting down")
        if (waiting := self.load - self.max_batch) >= self.max_queue:
            message = f"the queue is full, {waiting} responses wait: try again later"
            raise ApiError(429, message, code="rate_limit_exceeded")
        choices = {choice.request: choice for choice in ask.choices}
        self._owners |= choices
        self._loop = asyncio.get_running_loop()
        self._inbox.put(lambda: self._take(choices))
        try:
            yield
        finally:
            for request in choices:
                del self._owners[request]
            self._inbox.put(lambda: self._drop(choices))

    def drain(self) -> None:
        """From now on no request begins; those that have begun go on to their end."""
        self.draining = True
        if self._owners:
            self._post(self._turn_away)

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    def _deliver(self, pieces: Iterable[tuple[Request, Piece]]) -> None:
        for request, piece in pieces:
            if choice := self._owners.get(request):
                choice.ask.parts.put_nowait((choice, piece))

    def _fail(self, error: ApiError, requests: Iterable[Request]) -> None:
        for ask in {self._owners[r].ask for r in requests if r in self._owners}:
            ask.parts.put_nowait(error)

    def _turn_away(self) -> None:
        """Whoever has nothing yet hears that no request begins any more."""
        waiting = []
        for ask in {choice.ask for choice in self._owners.values()}:
            requests = [choice.request for choice in ask.choices]
            if not any(r.blocks or r.logprobs or r.completion for r in requests):
                waiting += requests
        self._fail(ApiError(503, "the server is shutting down"), waiting)

    # -- on its own thread ------------------------------------------------------------------------

    def _work(self) -> None:
        with self.model.frozen():
            while True:
                try:
                    if not self._listen():
                        return
                    pieces = self._scheduler.step()
                    self.stats = self._scheduler.stats()
                    self._post(self._deliver, pieces)
                except Exception as error:  # what the scheduler holds is of no use any more
                    self._post(self._fail, as_api_error(error), self._held)
                    self._renew()

    def _take(self, requests: Iterable[Request]) -> None:
        self._held.update(requests)
        self._scheduler.queue(requests)

    def _drop(self, requests: Iterable[Request]) -> None:
        self._held.difference_update(requests)
        self._scheduler.abort(*requests)

    def _renew(self) -> None:
        self._held: set[Request] = set()  # what the scheduler has been given, until it is dropped
        self._scheduler = Scheduler(self.model, self.tokenizer, max_batch=self.max_batch)
        self.served = Checkpoint(self._scheduler, self.names)
        self.stats = self._scheduler.stats()

    def _listen(self) -> bool:
        """Does what has been asked for; waits for something to do. False: it is time to end."""
        with suppress(queue.Empty):
            while command := self._inbox.get(block=not self._scheduler.busy):
                command()
                self.stats = self._scheduler.stats()
            return False
        return True

    def _post(self, call: Callable, *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it all who would listen
            self._loop.call_soon_threadsafe(call, *arguments)


_BOUNDS = "0.01 0.025 0.05 0.1 0.25 0.5 1.0 2.5 5.0 10.0 25.0 60.0 +Inf".split()  # seconds


class _Histogram(dict[str, float]):
    """How many of some durations are at most so long: what follows its name in each sample."""

    def __init__(self) -> None:
        super().__init__({f'_bucket{{le="{bound}"}}': 0 for bound in _BOUNDS}, _sum=0, _count=0)

    def add(self, seconds: float) -> None:
        for bound in _BOUNDS:
            self[f'_bucket{{le="{bound}"}}'] += seconds <= float(bound)
        self["_sum"] += seconds
        self["_count"] += 1


def _prometheus(stats: Stats, requests: dict, latency: dict, first_token: dict) -> str:
    """What /metrics says."""
    blocks = {f'{{state="{s}"}}': getattr(stats, f"blocks_{s}") for s in ("used", "cached", "free")}
    lines: list[str] = []
    for name, kind, samples, help in (
        ("requests_total", "counter", requests, "Requests answered; 499: the client left."),
        ("prompt_tokens_total", "counter", {"": stats.tokens_fed}, "Prompt tokens computed."),
        ("cached_tokens_total", "counter", {"": stats.cache_hits}, "Prompt tokens remembered."),
        ("generated_tokens_total", "counter", {"": stats.tokens_generated}, "Tokens drawn."),
        ("preemptions_total", "counter", {"": stats.preemptions}, "Sequences made to wait again."),
        ("running", "gauge", {"": stats.running}, "Responses computed at this moment."),
        ("waiting", "gauge", {"": stats.waiting}, "Responses that wait for their turn."),
        ("blocks", "gauge", blocks, "Pages of the cache."),
        ("request_seconds", "histogram", latency, "From a request to the end of its answer."),
        ("first_token_seconds", "histogram", first_token, "From a request to its first token."),
    ):
        name = f"instructcore_{name}"
        lines += (f"# HELP {name} {help}", f"# TYPE {name} {kind}")
        lines += (f"{name}{suffix} {value}" for suffix, value in samples.items())
    return "\n".join(lines) + "\n"


class _Stream(StreamingResponse):
    """Events until the last one. Whether the client stays is for the application to watch."""

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        await self.stream_response(send)


async def _cancel_if_gone(receive: Callable, answering: asyncio.Task) -> None:
    """Ends an answer where it is when the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    answering.cancel()


def make_app(engine: Engine, api_key: str = "") -> Callable:
    """The ASGI application. With a key, every request but those of / and /health must bear it."""
    requests: Counter[str] = Counter()  # by endpoint and status
    latency, first_token = _Histogram(), _Histogram()
    page = PAGE.read_text("utf-8")

    def reply(body: dict[str, Any], status: int = 200) -> Response:
        # A client that tries again may reach another server after 503, but the same bug after 500.
        again = {"retry-after": "1"}
        headers = {429: again, 503: again, 500: {"x-should-retry": "false"}}.get(status)
        return Response(json.dumps(body), status, headers, "application/json")

    def authorize(request: HTTPRequest) -> None:
        if request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise ApiError(403, "pages of another origin may not use this server")
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        right = secrets.compare_digest(key.encode("latin-1"), api_key.encode())
        if api_key and not (right and scheme.lower() == "bearer"):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def respond(request: HTTPRequest, begin: float, stack: ExitStack) -> Response:
        route = f"{request.method} {request.scope['path']}"
        if route == "GET /":
            return HTMLResponse(page, headers={"content-security-policy": PAGE_POLICY})
        if request.scope["path"] == "/health":
            return reply({"status": "ok"})
        authorize(request)
        if route == "GET /metrics":
            text = _prometheus(engine.stats, requests, latency, first_token)
            return Response(text, media_type="text/plain; version=0.0.4")
        if cards := _CARDS.fullmatch(route):
            return reply(engine.served.cards(*cards.groups()))
        if generate := _GENERATE.fullmatch(route):
            ask = await read(request, *generate.groups())
            stack.enter_context(engine.at_work(ask))
            watch = _cancel_if_gone(request.receive, asyncio.current_task())
            stack.callback(asyncio.create_task(watch).cancel)
            parts = follow(ask, begin)
            first = await anext(parts)
            first_token.add(time.perf_counter() - begin)
            if ask.stream:
                return _Stream(ask.events(first, parts), headers=EVENTS)
            return reply(await ask.whole(parts))
        raise ApiError(404, f"there is no {route}")

    async def read(request: HTTPRequest, chat: str | None, name: str | None) -> Ask:
        try:
            body = await asyncio.wait_for(read_body(request), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(400, f"the body took longer than {BODY_SECONDS} seconds") from None
        # There are others to serve while a long one is understood.
        return await asyncio.to_thread(Ask, engine.served, body, bool(chat), name)

    async def read_body(request: HTTPRequest) -> bytes:
        """What is too much is read, too: who still sends hears no answer."""
        body, size = bytearray(), 0
        async for part in request.stream():
            size += len(part)
            body += part if size <= MAX_BODY else b""
        require(size <= MAX_BODY, f"a body has at most {MAX_BODY} bytes, got {size}")
        return bytes(body)

    async def follow(ask: Ask, begin: float) -> AsyncIterator[Part]:
        """What comes of a request, until all of it is complete."""
        left = len(ask.choices)
        while left:
            part = await ask.parts.get()
            if isinstance(part, Exception):
                raise part
            left -= part[1].completion is not None
            yield part
        latency.add(time.perf_counter() - begin)

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        request, begin, status = HTTPRequest(scope, receive), time.perf_counter(), 499
        with suppress(asyncio.CancelledError, ClientDisconnect), ExitStack() as stack:
            try:
                response = await respond(request, begin, stack)
            except ClientDisconnect:
                raise
            except Exception as exception:
                error = as_api_error(exception)
                response = reply(error.body, error.status)
            response.headers["x-request-id"] = secrets.token_hex(12)
            response.headers["openai-processing-ms"] = f"{1000 * (time.perf_counter() - begin):.0f}"
            await response(scope, receive, send)
            status = response.status_code
        found = _GENERATE.fullmatch(f"{scope['method']} {scope['path']}")
        endpoint = ("chat" if found[1] else "completions") if found else "other"
        requests[f'{{endpoint="{endpoint}",status="{status}"}}'] += 1

    return app


@dataclass(frozen=True)
class ServeConfig:
    """Settings of `instructcore serve`."""

    checkpoint: str = option("", "a checkpoint, run or quickstart", positional=True, required=True)
    host: str = option("127.0.0.1", "address to listen on, 0.0.0.0 = all of this machine's")
    port: int = option(8000, "port to listen on, 0 = any free one", range="[0, 65535]")
    api_key: str = option("", "what clients must send as their API key; not given: nothing")
    alias: tuple[str, ...] = option(("text-davinci-003",), "names besides its own", metavar="NAME")
    max_batch: int = option(64, "computed at a time", unit="responses", range="[1, 4096]")
    max_queue: int = option(256, "that wait; then 429", unit="responses", range="[0, inf)")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "dtype to compute in", choices=("auto", "float32", "bfloat16"))

    def __post_init__(self) -> None:
        check_options(self)
        check(bool(self.checkpoint), "serve needs a checkpoint")


def make_server(engine: Engine, api_key: str = "") -> uvicorn.Server:
    """An HTTP server. A signal lets it finish what it has begun, a second one ends it at once."""
    settings = {"log_level": "warning", "lifespan": "off", "ws": "none", "access_log": False}
    server = uvicorn.Server(uvicorn.Config(make_app(engine, api_key), **settings))

    def handle_exit(number: int, frame: Any) -> None:
        if server.should_exit:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        print("finishing what has begun (once more: stop at once)", flush=True)
        server.should_exit = True
        engine.drain()

    server.handle_exit = handle_exit
    return server


def listen(host: str, port: int) -> socket.socket:
    """A socket whose connections send at once: else a chunk waits 40 ms for the last one's receipt.

    asyncio would see to that, but does not recognise a connection of `create_server` as TCP.
    """
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        message = f"cannot listen on {host}, port {port}: {error.strerror}"
        raise UserError(message) from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def run(config: ServeConfig) -> None:
    """Serves until SIGINT (Ctrl-C) or SIGTERM."""
    path, device = resolve_checkpoint(config.checkpoint), choose_device(config.device)
    with listen(config.host, config.port) as listener:
        model = load(path, dtype=choose_dtype(config.dtype, device), device=device)
        names = dict.fromkeys((Path(config.checkpoint).resolve().name, *config.alias))
        tokenizer, limits = Tokenizer.load(path), (config.max_batch, config.max_queue)
        engine = Engine(model, tokenizer, [*names], *limits)
        address = f"http://{config.host}:{listener.getsockname()[1]}"
        where = f"{address}/v1, a page to chat at {address}"
        print(f"serving {', '.join(names)} at {where}", flush=True)
        make_server(engine, config.api_key).run(sockets=[listener])
        engine.close()
