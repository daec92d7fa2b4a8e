"""An OpenAI-compatible server, and a page to chat on: `instructcore serve CKPT`.

    Engine   the scheduler, on the one thread that computes; what waits for it, and how much may
    _Metrics  what has been counted and timed, for Prometheus
    make_app  the routes, the errors, and what becomes of a client that leaves

The event loop reads requests and writes answers (`serve_wire` says what they mean); the engine's
thread takes commands from a queue before every step and sends back what the step has added to each
answer. The requests of a client that leaves are aborted before the next step, running or waiting.
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
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import uvicorn
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, Response, StreamingResponse

from .config import check, check_options, option
from .errors import UserError
from .model import GPT, load
from .scheduler import Request, Scheduler
from .serve_wire import ApiError, Ask, Checkpoint, Parts, as_api_error, require
from .tokenizer import Tokenizer
from .train import choose_device, choose_dtype, resolve_checkpoint

MAX_BODY = 8 << 20  # bytes of a request
BODY_SECONDS = 60  # until it must be here
PAGE = Path(__file__).parent / "static" / "chat.html"
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; frame-ancestors 'none'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)

_GET = re.compile(r"/v1/(models|engines)(?:/(.+))?")
_POST = re.compile(r"/v1/(?:(chat)/|engines/(.+)/)?completions")


class Engine:
    """A checkpoint under its names, its scheduler, and the one thread that works it.

    Args:
        max_batch: most choices computed at once.
        max_queue: most that wait; what comes then is turned away.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        names: Sequence[str],
        *,
        max_batch: int = 64,
        max_queue: int = 256,
    ) -> None:
        self.served = Checkpoint(model, tokenizer, names)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_batch, self.max_queue = max_batch, max_queue
        self.load, self.draining = 0, False  # choices that run or wait
        # What follows is the thread's own; but `stats`, replaced as a whole, may be looked at.
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._owners: dict[Request, tuple[Ask, int]] = {}
        self._renew()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
        self._thread.start()

    # -- on the event loop ------------------------------------------------------------------------

    async def answer(self, ask: Ask) -> AsyncIterator[Parts]:
        """The steps of an answer, when its turn has come. Closing it takes the request back."""
        if self.draining:
            raise ApiError(503, "the server is shutting down")
        if self.load >= self.max_batch + self.max_queue:
            waiting = self.load - self.max_batch
            message = f"the queue is full, {waiting} responses wait: try again later"
            raise ApiError(429, message, code="rate_limit_exceeded")
        self.load += (left := len(ask.choices))
        self._loop = asyncio.get_running_loop()
        self._inbox.put(partial(self._add, ask))
        try:
            while left:
                parts = await ask.parts.get()
                if isinstance(parts, Exception):
                    raise parts
                left -= sum(piece.completion is not None for *_, piece in parts)
                yield parts
        finally:
            self.load -= len(ask.choices)
            if left:
                self._inbox.put(partial(self._drop, ask))

    def drain(self) -> None:
        """From now on no request begins; those that have begun go on to their end."""
        self.draining = True
        self._inbox.put(self._refuse_waiting)

    def close(self) -> None:
        self._inbox.put(partial(setattr, self, "_closed", True))
        self._thread.join()

    # -- on its own thread ------------------------------------------------------------------------

    def _work(self) -> None:
        with self.model.frozen():
            while not self._closed:
                self._listen()
                try:
                    self._step()
                except Exception as error:  # what the scheduler holds is of no use any more
                    failure = as_api_error(error)
                    self._tell({ask: failure for ask, _ in self._owners.values()})
                    self._owners.clear()
                    self._renew()

    def _renew(self) -> None:
        self._scheduler = Scheduler(self.model, self.tokenizer, max_batch=self.max_batch)
        self.stats = self._scheduler.stats()

    def _listen(self) -> None:
        """Does what has been asked for; waits for something to do."""
        with suppress(queue.Empty):
            while not self._closed:
                self._inbox.get(block=not self._scheduler.busy)()
                self.stats = self._scheduler.stats()

    def _step(self) -> None:
        news: dict[Ask, Parts] = {}
        for request, piece in self._scheduler.step() if self._scheduler.busy else ():
            owner, i = self._owners[request]
            news.setdefault(owner, []).append((i, request, piece))
            if piece.completion:
                del self._owners[request]
        self.stats = self._scheduler.stats()
        self._tell(news)

    def _tell(self, news: dict[Ask, Any]) -> None:
        def deliver() -> None:
            for ask, item in news.items():
                ask.parts.put_nowait(item)

        with suppress(RuntimeError):  # the loop has ended, and with it all who would listen
            if news:
                self._loop.call_soon_threadsafe(deliver)

    def _add(self, ask: Ask) -> None:
        try:
            for prompt in ask.prompts:
                ask.requests += self._scheduler.requests(*prompt)
        except UserError as error:
            self._tell({ask: ApiError(400, str(error))})
        else:
            self._scheduler.queue(ask.requests)
            self._owners |= {request: (ask, i) for i, request in enumerate(ask.requests)}

    def _drop(self, ask: Ask) -> None:
        for request in ask.requests:
            if self._owners.pop(request, None):
                self._scheduler.abort(request)

    def _refuse_waiting(self) -> None:
        for ask in {ask for ask, _ in self._owners.values()}:
            if not any(r.blocks or r.logprobs or r.completion for r in ask.requests):
                self._drop(ask)
                self._tell({ask: ApiError(503, "the server is shutting down")})


class _Histogram:
    """How many of some durations are at most so long."""

    BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)

    def __init__(self) -> None:
        self.counts, self.seconds = [0] * (len(self.BOUNDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.BOUNDS, seconds)] += 1
        self.seconds += seconds

    def lines(self, name: str) -> Iterator[str]:
        *below, total = accumulate(self.counts)
        for bound, count in zip((*self.BOUNDS, "+Inf"), (*below, total), strict=True):
            yield f'{name}_bucket{{le="{bound}"}} {count}'
        yield f"{name}_sum {self.seconds:.6f}"
        yield f"{name}_count {total}"


class _Metrics:
    """What /metrics tells Prometheus."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by endpoint and status
        self.latency, self.first_token = _Histogram(), _Histogram()

    def text(self, engine: Engine) -> str:
        stats, lines = engine.stats, []

        def metric(name: str, kind: str, help: str, values: dict[str, Any] | _Histogram) -> None:
            name = f"instructcore_{name}"
            lines.extend((f"# HELP {name} {help}", f"# TYPE {name} {kind}"))
            if isinstance(values, _Histogram):
                lines.extend(values.lines(name))
            else:
                lines.extend(f"{name}{labels} {value}" for labels, value in values.items())

        requests = {
            f'{{endpoint="{endpoint}",status="{status}"}}': count
            for (endpoint, status), count in sorted(self.requests.items())
        }
        metric("requests_total", "counter", "Requests answered; 499: the client left.", requests)
        for name, kind, value, help in (
            ("prompt_tokens_total", "counter", stats.tokens_fed, "Prompt tokens computed."),
            ("cached_tokens_total", "counter", stats.cache_hits, "Prompt tokens remembered."),
            ("generated_tokens_total", "counter", stats.tokens_generated, "Tokens drawn."),
            ("preemptions_total", "counter", stats.preemptions, "Sequences made to wait again."),
            ("running", "gauge", stats.running, "Responses computed at this moment."),
            ("waiting", "gauge", stats.waiting, "Responses that wait for their turn."),
        ):
            metric(name, kind, help, {"": value})
        blocks = {"used": stats.blocks_used, "cached": stats.blocks_cached}
        blocks["free"] = stats.blocks_free
        blocks = {f'{{state="{state}"}}': count for state, count in blocks.items()}
        metric("blocks", "gauge", "Pages of the cache.", blocks)
        help = "Seconds from a request to the end of its answer."
        metric("request_seconds", "histogram", help, self.latency)
        help = "Seconds from a request to its first token."
        metric("first_token_seconds", "histogram", help, self.first_token)
        return "\n".join(lines) + "\n"


class _Stream(StreamingResponse):
    """Events, the first of which has come, until the last one or until the client is gone."""

    def __init__(self, first: str, events: AsyncIterator[str]) -> None:
        headers = {"content-type": "text/event-stream", "cache-control": "no-cache"}
        super().__init__(events, headers=headers)
        self.first = first

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        await _until_gone(receive, self.stream_response(send))

    async def stream_response(self, send: Callable) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        event = self.first
        while event:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            event = await anext(self.body_iterator, "")
        await send({"type": "http.response.body"})


async def _until_gone(receive: Callable, work: Awaitable) -> Any:
    """The result of the work, which ends where it is if the client leaves: ClientDisconnect."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        watching.cancel()
        if working.cancel():
            await asyncio.wait((working,))


def make_app(engine: Engine, api_key: str = "") -> Callable:
    """The ASGI application. With a key, every request but those of / and /health must bear it."""
    metrics, page = _Metrics(), PAGE.read_text("utf-8")

    def reply(body: dict[str, Any], status: int = 200) -> Response:
        # A client that tries again may reach another server after 503, but the same bug after 500.
        again = {"retry-after": "1"}
        headers = {429: again, 503: again, 500: {"x-should-retry": "false"}}.get(status)
        return Response(json.dumps(body), status, headers, "application/json")

    def authorize(headers: Mapping[str, str]) -> None:
        if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise ApiError(403, "pages of another origin may not use this server")
        scheme, _, key = headers.get("authorization", "").partition(" ")
        right = secrets.compare_digest(key.encode("latin-1"), api_key.encode())
        if api_key and not (right and scheme.lower() == "bearer"):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def respond(request: HTTPRequest) -> Response:
        path, method = request.scope["path"], request.method
        if method == "GET" and path == "/":
            return HTMLResponse(page, headers={"content-security-policy": PAGE_POLICY})
        if path == "/health":
            return reply({"status": "ok"})
        authorize(request.headers)
        if method == "GET" and path == "/metrics":
            return Response(metrics.text(engine), media_type="text/plain; version=0.0.4")
        if method == "GET" and (found := _GET.fullmatch(path)):
            return reply(engine.served.cards(*found.groups()))
        if method == "POST" and (found := _POST.fullmatch(path)):
            return await generate(request, *found.groups())
        raise ApiError(404, f"there is no {method} {path}")

    async def read(request: HTTPRequest) -> bytes:
        """The body. What is too much is read, too: who still sends hears no answer."""
        body, size = bytearray(), 0
        async for part in request.stream():
            size += len(part)
            body += part if size <= MAX_BODY else b""
        require(size <= MAX_BODY, f"a body has at most {MAX_BODY} bytes, got {size}")
        return bytes(body)

    async def generate(request: HTTPRequest, chat: str | None, name: str | None) -> Response:
        try:
            body = await asyncio.wait_for(read(request), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(400, f"the body took longer than {BODY_SECONDS} seconds") from None
        if len(body) < 1 << 16:
            ask = Ask(engine.served, body, bool(chat), name)
        else:  # there are others to serve meanwhile
            ask = await asyncio.to_thread(Ask, engine.served, body, bool(chat), name)
        answer = timed(engine.answer(ask), request.scope["begin"])
        if not ask.stream:
            return reply(await _until_gone(request.receive, ask.whole(answer)))
        events = ask.events(answer)
        return _Stream(await _until_gone(request.receive, anext(events)), events)

    async def timed(answer: AsyncIterator[Parts], begin: float) -> AsyncIterator[Parts]:
        first = True
        async with aclosing(answer):
            async for parts in answer:
                if first:
                    metrics.first_token.add(time.perf_counter() - begin)
                first = False
                yield parts
        metrics.latency.add(time.perf_counter() - begin)

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        request, begin = HTTPRequest(scope, receive), time.perf_counter()
        scope["begin"] = begin
        try:
            response = await respond(request)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody will see it
        except Exception as exception:
            error = as_api_error(exception)
            response = reply(error.body, error.status)
        response.headers["x-request-id"] = secrets.token_hex(12)
        response.headers["openai-processing-ms"] = f"{1000 * (time.perf_counter() - begin):.0f}"
        found, status = _POST.fullmatch(scope["path"]), response.status_code
        endpoint = ("chat" if found[1] else "completions") if found else "other"
        try:
            await response(scope, receive, send)
        except ClientDisconnect:
            status = 499
        finally:
            metrics.requests[endpoint, status] += 1
            if isinstance(response, _Stream):
                await response.body_iterator.aclose()

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
    max_batch: int = option(64, "computed at a time", unit="responses", range="[1, 4096]")
    max_queue: int = option(
        256, "that wait; more are turned away (429)", unit="responses", range="[0, inf)"
    )
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "dtype to compute in", choices=("auto", "float32", "bfloat16"))

    def __post_init__(self) -> None:
        check_options(self)
        check(bool(self.checkpoint), "serve needs a checkpoint")


def make_server(engine: Engine, api_key: str = "") -> uvicorn.Server:
    """An HTTP server. A signal lets it finish what it has begun, a second one ends it at once."""
    app = make_app(engine, api_key)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", lifespan="off", ws="none", access_log=False)
    )

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
        limits = {"max_batch": config.max_batch, "max_queue": config.max_queue}
        engine = Engine(model, Tokenizer.load(path), [*names], **limits)
        address = f"http://{config.host}:{listener.getsockname()[1]}"
        print(
            f"serving {', '.join(names)} at {address}/v1, a page to chat at {address}", flush=True
        )
        make_server(engine, config.api_key).run(sockets=[listener])
        engine.close()
