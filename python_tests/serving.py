"""What the server's tests share: tiny models, and a client of one served on a loopback port."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import torch

from instructcore.model import GPT, ModelConfig
from instructcore.scheduler import Scheduler
from instructcore.serve import Engine, listen, make_server
from instructcore.serve_wire import Checkpoint
from instructcore.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()
CONTEXT = 160
NAMES = ["toy", "an/alias", "text-davinci-003"]


def make_model(stage: str = "sft", context: int = CONTEXT) -> GPT:
    """A random model over bytes, of which many are those of Chinese characters."""
    sizes = dict(layers=1, heads=2, width=16, mlp_width=32)
    config = ModelConfig(vocab_size=TOKENIZER.vocab_size, context=context, **sizes)
    model = GPT(config, generator=torch.Generator().manual_seed(0))
    model.extra = {"stage": stage}
    return model


def make_engine(
    stage: str = "sft", context: int = CONTEXT, max_batch: int = 64, max_queue: int = 256
) -> Engine:
    scheduler = Scheduler(make_model(stage, context), TOKENIZER, max_batch=max_batch)
    return Engine(Checkpoint(scheduler, NAMES), max_queue)


def talkative(engine: Engine) -> Engine:
    """The engine, whose model now never ends its answers by itself."""
    head = engine.served.scheduler.model.logits

    def endless(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        logits[:, TOKENIZER.eos_id] = -100.0
        return logits

    engine.served.scheduler.model.logits = endless
    return engine


def slow_down(engine: Engine, seconds: float) -> Engine:
    """The engine, whose steps now take so much longer."""
    decode = engine.served.scheduler.model.decode

    def sleeps(*arguments) -> torch.Tensor:
        time.sleep(seconds)
        return decode(*arguments)

    engine.served.scheduler.model.decode = sleeps
    return engine


class Client(httpx.Client):
    """A client of an engine, served as long as the client is open."""

    def __init__(self, engine: Engine, api_key: str = "", **headers: str) -> None:
        listener = listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        super().__init__(base_url=f"http://127.0.0.1:{self.port}", timeout=300, headers=headers)
        self.engine, self.server = engine, make_server(engine, api_key)
        self.scheduler, self.model = engine.served.scheduler, engine.served.scheduler.model
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

    def metric(self, name: str) -> float:
        """A value of /metrics."""
        lines = self.get("/metrics").text.splitlines()
        (value,) = (line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} "))
        return float(value)

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.close()

    def close(self) -> None:
        super().close()
        self.server.should_exit = True
        self.thread.join()
        self.engine.close()


def eventually(condition, seconds: float = 60.0) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


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
    assert {"x-request-id", "openai-processing-ms"} <= response.headers.keys()
    (name, body), *more = response.json().items()
    assert name == "error" and not more and body.keys() == {"message", "type", "param", "code"}
    assert (body["param"], body["code"]) == (param, code), body
    kind = "server_error" if status >= 500 else "invalid_request_error"
    assert body["type"] == ("rate_limit_error" if status == 429 else kind)
    assert ("retry-after" in response.headers) == (status in (429, 503))
    return body["message"]


@contextmanager
def servers_for_clients(key: str) -> Iterator[dict[str, str]]:
    """The addresses of what `test_serve_clients.py` needs, while they are served."""
    names = ("main", "full", "broken", "breaking", "leaving")
    limits: dict[str, dict] = {"full": {"max_batch": 1, "max_queue": 0}}
    engines = {name: make_engine(context=1024, **limits.get(name, {})) for name in names}
    models = {name: engine.served.scheduler.model for name, engine in engines.items()}
    head, later = models["broken"].logits, models["breaking"].decode

    def breaks(tokens, starts, cache) -> torch.Tensor:
        if cache.seqlens.max() > 40:
            raise RuntimeError("this one is meant to break")
        return later(tokens, starts, cache)

    models["broken"].logits = lambda hidden: head(hidden) * float("nan")
    models["breaking"].decode = breaks
    slow_down(engines["full"], 0.005)
    engines["leaving"].drain()
    with ExitStack() as stack:
        clients = {n: stack.enter_context(Client(e, key)) for n, e in engines.items()}
        yield {name: str(client.base_url) for name, client in clients.items()}
