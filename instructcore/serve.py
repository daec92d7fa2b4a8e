"""An OpenAI-compatible server, and a page to chat on: `instructcore serve CKPT`.

    Engine       the scheduler, on the one thread that computes; what waits for it, how much may
    _prometheus  what has been counted and timed
    make_app     the routes, the errors, and what becomes of a client that leaves

The event loop reads requests and writes answers (`serve_wire` says what they mean); the engine's
thread takes commands from a queue before every step and sends back what the step has added. The
requests of a client that leaves are aborted before the next step, running or waiting; so are those
of one that takes nothing of its answer for long.
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
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import uvicorn
from starlette import requests as http
from starlette.responses import FileResponse, Response, StreamingResponse

from .config import check_options, option
from .errors import UserError
from .scheduler import Piece, Request, Scheduler, Stats
from .serve_wire import ApiError, Ask, Checkpoint, Part, as_api_error, require
from .train import load_checkpoint

MAX_BODY = 8 << 20  # bytes of a request
BODY_SECONDS = 60  # until it must be here
SEND_SECONDS = 120  # that a client may take nothing of its answer, however much waits
PAGE = Path(__file__).parent / "static" / "chat.html"
PAGE_POLICY = "default-src 'none'; connect-src 'self'; img-src data:; frame-ancestors 'none'; "
PAGE_POLICY += "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
EVENTS = {"content-type": "text/event-stream", "cache-control": "no-cache"}

_CARDS = re.compile(r"GET /v1/(models|engines)(?:/(.+))?")
_GENERATE = re.compile(r"POST /v1/(?:(chat)/|engines/(.+)/)?completions")


@dataclass(eq=False)
class Engine:
    """What is served, and the one thread that works its scheduler.

    If a step fails, so do all who wait for an answer at that moment; the next ones are served.
    """

    served: Checkpoint
    max_queue: int = 256  # most choices that wait; what comes then is turned away

    def __post_init__(self) -> None:
        self.served.scheduler.model.eval()
        self.draining, self.stats = False, self.served.scheduler.stats()  # the thread's last ones
        self._owners: dict[Request, asyncio.Queue] = {}  # who waits for its pieces
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
        self._thread.start()

    # -- on the event loop ------------------------------------------------------------------------

    async def answer(self, ask: Ask) -> AsyncIterator[Part]:
        """What comes of a request, until all of it is complete; closed, it gives up the rest."""
        if self.draining:
            raise ApiError(503, "the server is shutting down")
        scheduler, unfinished = self.served.scheduler, [r for r in self._owners if not r.completion]
        if (waiting := len(unfinished) - scheduler.max_batch) >= self.max_queue:
            message = f"the queue is full, {waiting} responses wait: try again later"
            raise ApiError(429, message, code="rate_limit_exceeded")
        parts: asyncio.Queue[tuple[Request, Piece | ApiError]] = asyncio.Queue()
        owned, left = {choice.request: choice for choice in ask.choices}, len(ask.choices)
        self._owners |= dict.fromkeys(owned, parts)
        self._loop = asyncio.get_running_loop()
        self._inbox.put(lambda: scheduler.queue(owned))
        try:
            while left:
                request, part = await parts.get()
                if isinstance(part, ApiError):
                    raise part
                left -= part.completion is not None
                yield owned[request], part
        finally:
            for request in owned:
                del self._owners[request]
            self._inbox.put(lambda: scheduler.abort(*owned))

    def drain(self) -> None:
        """From now on no request begins, which those that wait are told; the others go on."""
        self.draining, owners = True, [*self._owners.items()]
        begun = {parts for r, parts in owners if r.blocks or r.logprobs or r.completion}
        waiting = [request for request, parts in owners if parts not in begun]
        if waiting:
            self._post([(r, ApiError(503, "the server is shutting down")) for r in waiting])

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    def _deliver(self, parts: Iterable[tuple[Request, Piece | ApiError]]) -> None:
        for request, part in parts:
            if request in self._owners:
                self._owners[request].put_nowait((request, part))

    # -- on its own thread ------------------------------------------------------------------------

    def _work(self) -> None:
        """Steps as long as there is something to do, and what it is told between them."""
        scheduler = self.served.scheduler
        with scheduler.model.frozen():
            while True:
                pieces: list[tuple[Request, Piece | ApiError]] = []
                try:
                    if scheduler.busy and self._inbox.empty():
                        pieces = scheduler.step()
                    elif command := self._inbox.get():
                        command()
                    else:
                        return
                except Exception as error:  # what it was at is of no use any more
                    failure = as_api_error(error)
                    pieces = [(request, failure) for request in [*self._owners]]
                    scheduler.reset()
                self.stats = scheduler.stats()
                self._post(pieces)

    def _post(self, parts: Iterable[tuple[Request, Piece | ApiError]]) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it all who would listen
            self._loop.call_soon_threadsafe(self._deliver, parts)


# What follows a histogram's name in its samples: how many took at most so many seconds.
_BOUNDS = "0.01 0.025 0.05 0.1 0.25 0.5 1.0 2.5 5.0 10.0 25.0 60.0 +Inf".split()
_BUCKETS = {f'_bucket{{le="{bound}"}}': float(bound) for bound in _BOUNDS}


def _observe(histogram: Counter[str], seconds: float) -> None:
    within = {name: seconds <= bound for name, bound in _BUCKETS.items()}
    histogram.update(within, _sum=seconds, _count=1)


def _prometheus(stats: Stats, answered: dict, latency: dict, first_token: dict) -> str:
    """What /metrics says."""
    rows: list[tuple[str, str, dict, str]] = [
        ("requests_total", "counter", answered, "Requests answered; 499: the client left."),
        ("request_seconds", "histogram", latency, "From a request to the end of its answer."),
        ("first_token_seconds", "histogram", first_token, "From a request to its first token."),
    ]
    for name, hint in get_type_hints(Stats, include_extras=True).items():
        kind, help = hint.__metadata__
        rows.append((name + "_total" * (kind == "counter"), kind, {"": getattr(stats, name)}, help))
    lines: list[str] = []
    for name, kind, samples, help in rows:
        name = f"instructcore_{name}"
        lines += (f"# HELP {name} {help}", f"# TYPE {name} {kind}")
        lines += (f"{name}{suffix} {value}" for suffix, value in samples.items())
    return "\n".join(lines) + "\n"


async def _cancel_if_gone(receive: Callable, answering: asyncio.Task) -> None:
    """Ends an answer where it is when the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    answering.cancel()


def make_app(engine: Engine, api_key: str = "") -> Callable:
    """The ASGI application. With a key, every request but those of / and /health must bear it."""
    answered: Counter[str] = Counter()  # by endpoint and status
    latency, first_token = (Counter(dict.fromkeys(_BUCKETS, 0), _sum=0, _count=0) for _ in range(2))

    def reply(body: dict[str, Any], status: int = 200, headers: dict | None = None) -> Response:
        return Response(json.dumps(body), status, headers, "application/json")

    def authorize(headers: Mapping[str, str]) -> None:
        if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise ApiError(403, "pages of another origin may not use this server")
        scheme, _, key = headers.get("authorization", "").partition(" ")
        right = secrets.compare_digest(key.encode("latin-1"), api_key.encode())
        if api_key and not (right and scheme.lower() == "bearer"):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def respond(request: http.Request, begin: float, stack: AsyncExitStack) -> Response:
        route = f"{request.method} {request.scope['path']}"
        if route == "GET /":
            return FileResponse(PAGE, headers={"content-security-policy": PAGE_POLICY})
        if request.scope["path"] == "/health":
            return reply({"status": "ok"})
        authorize(request.headers)
        if route == "GET /metrics":
            text = _prometheus(engine.stats, answered, latency, first_token)
            return Response(text, media_type="text/plain; version=0.0.4")
        if cards := _CARDS.fullmatch(route):
            return reply(engine.served.cards(*cards.groups()))
        if generate := _GENERATE.fullmatch(route):
            try:
                body = await asyncio.wait_for(read(request), BODY_SECONDS)
            except asyncio.TimeoutError:
                raise ApiError(400, f"the body took longer than {BODY_SECONDS} seconds") from None
            require(len(body) <= MAX_BODY, f"a body has at most {MAX_BODY} bytes")
            # There are others to serve while a long one is understood.
            ask = await asyncio.to_thread(Ask, engine.served, body, *generate.groups())
            watch = _cancel_if_gone(request.receive, asyncio.current_task())
            stack.callback(asyncio.create_task(watch).cancel)
            parts = await stack.enter_async_context(aclosing(engine.answer(ask)))
            first = await anext(parts)
            _observe(first_token, time.perf_counter() - begin)
            if ask.stream:
                return StreamingResponse(ask.events(first, parts), headers=EVENTS)
            return reply(await ask.whole(parts))
        raise ApiError(404, f"there is no {route:.100}")

    async def read(request: http.Request) -> bytes:
        """The body. What is too much is read, too, as who still sends hears no answer; not kept."""
        body = bytearray()
        async for part in request.stream():
            body += part[: MAX_BODY + 1 - len(body)]
        return bytes(body)

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        request, begin, status = http.Request(scope, receive), time.perf_counter(), 499
        async with AsyncExitStack() as stack:
            stack.enter_context(suppress(asyncio.CancelledError, http.ClientDisconnect))
            try:
                response = await respond(request, begin, stack)
            except http.ClientDisconnect:
                raise
            except Exception as exception:
                error = as_api_error(exception)
                response = reply(error.body, error.status, error.headers)
            response.headers["x-request-id"] = secrets.token_hex(12)
            response.headers["openai-processing-ms"] = f"{1000 * (time.perf_counter() - begin):.0f}"
            streams = isinstance(response, StreamingResponse)  # it need not watch the client, too
            await (response.stream_response(send) if streams else response(scope, receive, send))
            status = response.status_code
        found = _GENERATE.fullmatch(f"{scope['method']} {scope['path']}")
        endpoint = ("chat" if found[1] else "completions") if found else "other"
        answered[f'{{endpoint="{endpoint}",status="{status}"}}'] += 1
        if found and status == 200:
            _observe(latency, time.perf_counter() - begin)

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


def make_server(engine: Engine, api_key: str = "") -> uvicorn.Server:
    """An HTTP server. A signal lets it finish what it has begun, a second one ends it at once."""
    settings = {"log_level": "warning", "lifespan": "off", "ws": "none", "access_log": False}
    server = uvicorn.Server(uvicorn.Config(make_app(engine, api_key), **settings))

    def handle_exit(number: int, frame: Any) -> None:
        for ending in (signal.SIGINT, signal.SIGTERM):  # from now on they end it at once
            signal.signal(ending, signal.SIG_DFL)
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
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"cannot listen on {host}, port {port}: {error.strerror}") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SEND_SECONDS))
    return listener


def run(config: ServeConfig) -> None:
    """Serves until SIGINT (Ctrl-C) or SIGTERM."""
    with listen(config.host, config.port) as listener:
        model, tokenizer = load_checkpoint(config.checkpoint, config.device, config.dtype)
        scheduler = Scheduler(model, tokenizer, max_batch=config.max_batch)
        names = [*dict.fromkeys((Path(config.checkpoint).resolve().name, *config.alias))]
        engine = Engine(Checkpoint(scheduler, names), config.max_queue)
        host = f"[{config.host}]" if ":" in config.host else config.host
        url = f"http://{host}:{listener.getsockname()[1]}"
        print(f"serving {', '.join(names)} at {url}/v1, a page to chat at {url}", flush=True)
        make_server(engine, config.api_key).run(sockets=[listener])
        engine.close()
