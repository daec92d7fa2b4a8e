"""The engine: prompts become responses, many at a time, in steps of one packed forward each.

A step feeds every running sequence its last token and new ones pieces of their prompts, end to end
and without padding; it draws a token for each that has been fed all it has. Keys and values lie in
pages of a common cache:

    a whole page is remembered by what it holds (its tokens, and the page before), until its room is
    needed or the weights change: a prompt that begins like an older text begins with its pages
    the n responses to a prompt share its pages; each gets a copy of the last one, if not full
    when no page is left, the newest sequence gives its own back and waits; it is fed again later

A response is a function of its prompt and its parameters alone: the noise that draws a token
depends on seed, position and token, and on the CPU no kernel's bits depend on what else a step does
or how a prompt was cut. Three parts:

    Request    what is asked for and what has come of it, on the host
    _Pages     who holds which page, and which pages hold what
    Scheduler  admits requests, runs steps; owns the cache, and a row of controls per sequence
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import index
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from . import ops
from .config import check, check_options, option
from .errors import UserError
from .model import GPT, KVCache
from .tokenizer import Tokenizer
from .train import mix

SCORED_ROWS = 256  # positions of a prompt whose logits exist at a time


@dataclass(frozen=True)
class SamplingParams:
    """How a prompt is continued. Truncations apply in the order top_k, top_p, min_p.

    The ranges keep the sampler's float32 from overflowing, which would end the step for all in it.
    """

    max_tokens: int = option(128, "longest response", unit="tokens", range="[0, inf)")
    temperature: float = option(1.0, "0 = always the likeliest token", range="[0, 1e6]")
    top_k: int = option(0, "only the k likeliest tokens, 0 = all", unit="tokens", range="[0, 1e9]")
    top_p: float = option(
        1.0, "only the likeliest tokens of this mass together", unit="probability", range="[0, 1]"
    )
    min_p: float = option(
        0.0, "only tokens this likely", unit="share of the likeliest's probability", range="[0, 1]"
    )
    seed: int | None = option(
        None, "seed of the draws; not given: a new one each time", range="[0, 9223372036854775808)"
    )
    stop: tuple[str, ...] = option((), "strings that end a response, not part of it")
    n: int = option(1, "responses per prompt", range="[1, inf)")
    stop_token_ids: tuple[int, ...] = option((), "token ids that end a response, part of it")
    min_tokens: int = option(0, "no end before", unit="tokens", range="[0, inf)")
    ignore_eos: bool = option(False, "the end-of-text token does not end a response")
    repetition_penalty: float = option(
        1.0, "divides the logit of tokens already there, 1 = off", range="[0.01, 1e6]"
    )
    presence_penalty: float = option(
        0.0, "off the logit of tokens of the response", unit="nats", range="[-1e6, 1e6]"
    )
    frequency_penalty: float = option(
        0.0, "the same, times how often they occur", unit="nats", range="[-1e6, 1e6]"
    )
    # What programs ask for, not the command line.
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # id: nats added
    allowed_token_ids: tuple[int, ...] | None = None  # no other id is drawn; None: all are
    top_logprobs: int = 0  # also those of so many likeliest tokens, 0 .. 20
    prompt_logprobs: bool = False  # also those of the prompt; then max_tokens may be 0

    def __post_init__(self) -> None:
        check_options(self)
        check(
            not isinstance(self.stop, str) and all(self.stop),
            f"stop must be a tuple of strings that are not empty, got {self.stop!r}",
        )
        check(
            self.max_tokens > 0 or self.prompt_logprobs,
            "--max-tokens must be in [1, inf), or 0 with prompt_logprobs, got 0",
        )
        check(
            0 <= self.top_logprobs <= 20,
            f"top_logprobs must be in 0 .. 20, got {self.top_logprobs}",
        )
        check(
            all(map(math.isfinite, self.logit_bias.values())),
            f"logit_bias must be finite, got {self.logit_bias}",
        )

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


Top = dict[int, float]  # log-probabilities of the likeliest tokens, from the likeliest on


class Completion(NamedTuple):
    """A response."""

    token_ids: list[int]  # as sampled: with the end-of-text token that ended it, if one did
    logprobs: list[float]  # of these tokens, from the raw logits at temperature 1
    sampled_logprobs: list[float]  # from the distribution they were drawn from
    finish_reason: str  # "stop": by a stop token or string; "length": at a limit
    text: str  # without special tokens; up to the stop string
    top_logprobs: list[Top] | None = None  # one of raw logits per token, if asked for
    prompt_logprobs: list[float | None] | None = None  # of the prompt's tokens; the first has none
    prompt_top_logprobs: list[Top | None] | None = None


class Piece(NamedTuple):
    """What has come to a response since its last piece."""

    index: int  # of the response: in the order of `Generator.follow`; among the n of its prompt
    text: str  # whole characters, which never run into a stop string
    completion: Completion | None  # the whole response, once it is complete
    token_ids: Sequence[int] = ()  # these may be ahead of the text
    logprobs: Sequence[float] = ()
    top_logprobs: Sequence[Top] = ()


class Stats(NamedTuple):
    """The scheduler at this moment (gauges), and what it has done so far (counters)."""

    running: Annotated[int, "gauge", "Responses computed at this moment."]
    waiting: Annotated[int, "gauge", "Responses that wait for their turn."]
    blocks_used: Annotated[int, "gauge", "Pages of the cache held by running sequences."]
    blocks_free: Annotated[int, "gauge", "Pages that hold nothing."]
    blocks_cached: Annotated[int, "gauge", "Pages held by none, but remembered; free, too."]
    tokens_generated: Annotated[int, "counter", "Tokens drawn."]
    tokens_fed: Annotated[int, "counter", "Tokens fed, of prompts and once more after preemption."]
    cache_hits: Annotated[int, "counter", "Tokens not fed, since remembered pages held them."]
    preemptions: Annotated[int, "counter", "Sequences made to wait again."]


@dataclass(eq=False, slots=True)
class Request:
    """One response to be."""

    prompt: list[int]
    params: SamplingParams
    index: int  # among the n of its prompt
    seed: int
    limit: int  # most tokens of the response
    stop_ids: frozenset[int]
    text: _Text
    ids: list[int]  # the prompt and what was drawn
    logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Top] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    prompt_top_logprobs: list[Top | None] = field(default_factory=list)
    completion: Completion | None = None
    # Where it stands in the cache.
    held: int = 0  # tokens
    fed: int = 0  # tokens that it is fed in this step
    blocks: list[int] = field(default_factory=list)
    whole: int = 0  # blocks that are remembered, and
    node: int | None = 0  # what is known of the last one; None: the weights have changed since
    _read: int = 0  # tokens that the text has seen, and
    _taken: int = 0  # that were in a piece

    @property
    def token_ids(self) -> list[int]:
        return self.ids[len(self.prompt) :]

    @property
    def wants_scores(self) -> bool:
        """Whether log-probabilities of the prompt are still to come."""
        return self.params.prompt_logprobs and len(self.prompt_logprobs) < len(self.prompt)

    @property
    def controls(self) -> list[str]:
        """Which controls of the vocabulary's width it needs."""
        p = self.params
        names = ["bias"] if p.logit_bias else []
        names += ["allowed"] if p.allowed_token_ids is not None or p.min_tokens else []
        return names + (["seen", "counts"] if p.penalised else [])

    def accept(self, id: int, logprob: float, sampled_logprob: float) -> bool:
        """Takes in the token just drawn; whether it is the last."""
        self.ids.append(id)
        self.logprobs.append(logprob)
        self.sampled_logprobs.append(sampled_logprob)
        stopped = bool(self.params.stop) and self._understand()
        stopped |= id in self.stop_ids
        if stopped or len(self.logprobs) == self.limit:
            self.finish("stop" if stopped else "length")
            return True
        return False

    def finish(self, reason: str) -> None:
        self._understand()
        p, text = self.params, self.text.finish()
        record = (self.token_ids, self.logprobs, self.sampled_logprobs, reason, text)
        scores = (self.prompt_logprobs, self.prompt_top_logprobs if p.top_logprobs else None)
        self.completion = Completion(
            *record,
            self.top_logprobs if p.top_logprobs else None,
            *(scores if p.prompt_logprobs else (None, None)),
        )

    def take(self) -> Piece:
        """What has come since the last call."""
        if self.completion is None:
            self._understand()
        first, self._taken = self._taken, len(self.logprobs)
        new = (self.ids[len(self.prompt) + first :], self.logprobs[first:])
        return Piece(self.index, self.text.take(), self.completion, *new, self.top_logprobs[first:])

    def _understand(self) -> bool:
        """Lets the text catch up; whether a stop string is complete."""
        for id in self.ids[len(self.prompt) + self._read :]:
            self.text.feed(id)
        self._read = len(self.logprobs)
        return self.text.stopped


class _Text:
    """The text of ids as they come, up to the first stop string to be complete.

    What may be the beginning of a stop string is held back.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt: list[int]) -> None:
        self._stream, self._stops = tokenizer.stream(prompt), params.stop
        self._exempt = params.min_tokens
        self._held = ""
        self._pieces: list[str] = []
        self._taken = 0
        self.stopped = False

    def feed(self, id: int) -> bool:
        """Takes in the next id; whether a stop string is complete."""
        self._held += self._stream.feed(id)
        self._exempt -= 1
        if self._stops and self._exempt <= 0:
            self._cut()
        else:
            self._pieces.append(self._held)
            self._held = ""
        return self.stopped

    def finish(self) -> str:
        """The whole text."""
        if not self.stopped:
            self._held += self._stream.flush()
            self._cut()
            self._pieces.append(self._held)
        return "".join(self._pieces)

    def take(self) -> str:
        """What has come since the last call."""
        text = "".join(self._pieces[self._taken :])
        self._taken = len(self._pieces)
        return text

    def _cut(self) -> None:
        held = self._held
        starts = ((held.find(stop), stop) for stop in self._stops)
        found = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if found:
            self.stopped, keep, rest = True, min(found)[1], len(held)
        else:
            keep = rest = next(
                (i for i in range(len(held)) if any(s.startswith(held[i:]) for s in self._stops)),
                len(held),
            )
        self._pieces.append(held[:keep])
        self._held = held[rest:]


class _Pages:
    """The pages of the cache. One is free, held by sequences, or idle: remembered, held by none.

    A remembered page has a node, a number that stands for its tokens and all those before them: it
    is found by (node of the page before, its tokens), the first one by (0, its tokens). So nothing
    rests on a hash being unique.
    """

    def __init__(self, count: int) -> None:
        self.holders = [0] * count
        self.free = list(range(count))[::-1]
        self.idle: OrderedDict[int, None] = OrderedDict()  # the one to go first comes first
        self._found: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # (node, page)
        self._keys: list[tuple[int, tuple[int, ...]] | None] = [None] * count
        self._nodes = 0

    @property
    def available(self) -> int:
        return len(self.free) + len(self.idle)

    def take(self) -> int:
        """A page for a sequence of its own."""
        if self.free:
            page = self.free.pop()
        else:
            page, _ = self.idle.popitem(last=False)
            del self._found[self._keys[page]]
            self._keys[page] = None
        self.holders[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.holders[page] += 1
            self.idle.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """What comes later in a text is forgotten earlier: it is of no use without the rest."""
        for page in reversed(pages):
            self.holders[page] -= 1
            if self.holders[page] == 0 and self._keys[page] is None:
                self.free.append(page)
            elif self.holders[page] == 0:
                self.idle[page] = None

    def find(self, parts: Iterable[tuple[int, ...]]) -> tuple[list[int], int]:
        """The remembered pages that a text begins with, and the last one's node."""
        node, pages = 0, []
        for part in parts:
            if (node, part) not in self._found:
                break
            node, page = self._found[node, part]
            pages.append(page)
        return pages, node

    def remember(self, page: int, node: int, part: tuple[int, ...]) -> int:
        """A page became whole; returns the node. If another holds the same, that one counts."""
        key = (node, part)
        if key not in self._found:
            self._nodes += 1
            self._found[key], self._keys[page] = (self._nodes, page), key
        return self._found[key][0]

    def forget(self) -> None:
        """What the pages hold is out of date."""
        self._found.clear()
        self._keys = [None] * len(self._keys)
        self.free += self.idle
        self.idle.clear()


class Scheduler:
    """Runs requests on a model, whose weights it shares; not for several threads at a time.

    Between steps requests may be added and aborted, and weights may change: what was computed with
    old ones is not found again, though running sequences keep it. While weights do not change,
    `model.frozen()` around the steps spares the casts.

    Args:
        model: a GPT with head "lm".
        tokenizer: for texts, stop strings and the end-of-text token.
        max_batch: most sequences at once; the others wait.
        prefill_tokens: most tokens of prompts in a step; None: 512, on a GPU 8192.
        cache_bytes: most memory for keys and values, but never less than a sequence needs.
        block_size: tokens in a page of the cache.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 128,
        prefill_tokens: int | None = None,
        cache_bytes: int = 1 << 30,
        block_size: int = 16,
    ) -> None:
        check(model.head == "lm", "this is a reward model: it has no language-model head")
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens
        self.cache_bytes, self.block_size = cache_bytes, block_size
        end = model.token_ids.get("eos_token_id")
        ends = {tokenizer.eos_id, *(end if isinstance(end, list) else [end])}
        vocab = range(model.config.vocab_size)
        self.eos_ids = frozenset(id for id in ends if id in vocab)
        self._generated = self._fed = self._hits = self._preemptions = 0
        self.reset()

    def reset(self) -> None:
        """Forgets all requests and the cache: a step that failed leaves them in no known state."""
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # those that are fed a token and draw one, oldest first
        self._partial: Request | None = None  # the one of whose prompt more is to be fed
        self._cache: KVCache | None = None

    # -- requests ---------------------------------------------------------------------------------

    def add(
        self, prompt: Sequence[int], params: SamplingParams = SamplingParams()
    ) -> list[Request]:
        """Queues the `n` responses to a prompt.

        Raises:
            UserError: the prompt is empty, leaves no room in the context or holds an unknown id.
        """
        requests = self.requests(prompt, params)
        self.queue(requests)
        return requests

    def requests(self, prompt: Sequence[int], params: SamplingParams) -> list[Request]:
        """What `add` queues."""
        prompt = self.check_prompt(prompt, params.max_tokens)
        config, stop_ids = self.model.config, frozenset(params.stop_token_ids)
        for name, ids in (
            ("stop_token_ids", stop_ids),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("logit_bias", params.logit_bias),
        ):
            known = all(0 <= id < config.vocab_size for id in ids)
            check(known, f"{name} must be in 0 .. {config.vocab_size - 1}, got {ids}")
        if not params.ignore_eos:
            stop_ids |= self.eos_ids
        ends = stop_ids if params.min_tokens else frozenset()
        allowed = params.allowed_token_ids
        left = config.vocab_size - len(ends) if allowed is None else len({*allowed} - ends)
        check(left > 0, "min_tokens and allowed_token_ids must leave a token to draw")
        limit = min(params.max_tokens, config.context - len(prompt))
        requests = []
        for sample in range(params.n):
            if params.seed is None:  # from torch's generator, which the caller may have seeded
                seed = int(torch.randint(1 << 62, ()))
            else:
                seed = mix(params.seed, sample) if sample else params.seed
            text = _Text(self.tokenizer, params, prompt)
            rest = (sample, seed, limit, stop_ids, text, list(prompt))
            requests.append(Request(prompt, params, *rest))
        return requests

    def queue(self, requests: Iterable[Request]) -> None:
        if not self.busy:
            self._allocate()
        self._waiting.extend(requests)

    def check_prompt(self, prompt: Sequence[int], max_tokens: int = 1) -> list[int]:
        """The ids of a prompt; a UserError if it cannot be continued."""
        config = self.model.config
        try:
            ids = list(map(index, prompt))
        except TypeError:
            want = "a prompt must be token ids, such as those of tokenizer.prompt_ids(text)"
            raise UserError(f"{want}, got {prompt!r:.60}") from None
        check(len(ids) > 0, "a prompt needs at least one token, got an empty one")
        shorter = "shorter than" if max_tokens else "no longer than"
        check(
            len(ids) + bool(max_tokens) <= config.context,
            f"a prompt must be {shorter} the context of {config.context} tokens, got {len(ids)}",
        )
        last = config.vocab_size - 1
        check(
            0 <= min(ids) and max(ids) <= last,
            f"token ids must be in 0 .. {last}, got {min(ids)} .. {max(ids)}",
        )
        return ids

    def abort(self, *requests: Request) -> None:
        """Ends requests that are here and have not ended; their pages are free at once."""
        for request in requests:
            if request in self._running:
                self._leave([r is not request for r in self._running])
            elif request is self._partial:
                self._partial = None
            elif request in self._waiting:
                self._waiting.remove(request)
            else:
                continue
            self._release(request)

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._waiting or self._running or self._partial)

    def stats(self) -> Stats:
        pages = _Pages(0) if self._cache is None else self._pages
        free, cached = len(pages.free), len(pages.idle)
        return Stats(
            running=len(self._running) + (self._partial is not None),
            waiting=len(self._waiting),
            blocks_used=len(pages.holders) - free - cached,
            blocks_free=free,
            blocks_cached=cached,
            tokens_generated=self._generated,
            tokens_fed=self._fed,
            cache_hits=self._hits,
            preemptions=self._preemptions,
        )

    # -- steps ------------------------------------------------------------------------------------

    def step(self) -> list[tuple[Request, Piece]]:
        """One forward, and what has come of it."""
        return [(request, request.take()) for request in self.advance()]

    @torch.no_grad()
    def advance(self) -> list[Request]:
        """One forward: the next token of every running sequence, the first one of new ones.

        Returns those with a new token, and those who asked for none and have their scores.
        """
        self._grow()
        before = len(self._running)
        joined, aside, forks = self._admit()
        self._running += joined
        running, count, new = self._running, len(self._running), joined + aside
        if new:
            tokens, cu_seqlens, last = self._join(before, joined, aside)
        else:
            tokens, cu_seqlens = self._integers[0, :count], self._counting[: count + 1]
        rows = count + len(aside)
        if not rows:
            return []
        cache = self._cache
        cache.block_table, cache.seqlens = self._table[:rows], self._seqlens[:rows]
        hidden = self.model.decode(tokens, cu_seqlens, cache)
        done = []
        if new:
            done = self._settle(new, forks, hidden[before:])
            hidden = hidden[last]
        if count:
            self._draw(self.model.logits(hidden))
        return done + running

    def _grow(self) -> None:
        """A page for every sequence that has filled its own, at the newest ones' expense."""
        rows, columns, new = [], [], []
        for row, request in enumerate(self._running):
            if row >= len(self._running):
                break  # these have just been made to wait
            if request.held < len(request.blocks) * self.block_size:
                continue
            while not self._pages.available:
                self._preempt()
            if row < len(self._running):
                new.append(self._pages.take())
                rows.append(row)
                columns.append(len(request.blocks))
                request.blocks.append(new[-1])
        if new:
            at = self._tensor((rows, columns), torch.int64)
            self._table[at[0], at[1]] = self._tensor(new, torch.int32)

    def _preempt(self) -> None:
        """The newest sequence gives its pages back; it will be fed again, with what it has drawn.

        The oldest one comes to its end: alone, it has pages enough.
        """
        request, self._partial = self._partial, None
        if request is None:
            request = self._running[-1]
            self._leave([r is not request for r in self._running])
        self._release(request)
        self._waiting.appendleft(request)
        self._preemptions += 1

    def _release(self, request: Request) -> None:
        self._pages.release(request.blocks)
        request.blocks, request.held, request.whole, request.node = [], 0, 0, 0

    def _admit(self) -> tuple[list[Request], list[Request], list[tuple[Request, Request]]]:
        """Who is fed in this step, and how much.

        Returns those who then join the running ones, since they have been fed all they have; those
        who do not; and of the first who shares whose pages, having the same prompt.
        """
        joined: list[Request] = []
        aside: list[Request] = []
        forks: list[tuple[Request, Request]] = []
        budget = self.prefill_tokens or (8192 if self._device.type == "cuda" else 512)
        if self._waiting and len(self._running) < self.max_batch:
            self._look_at_weights()
        while budget > 0 and (request := self._partial or self._next(len(joined) + len(aside))):
            request.fed = min(budget, len(request.ids) - request.held)
            budget -= request.fed
            self._partial = None
            if request.held + request.fed < len(request.ids):
                self._partial = request
            if self._partial or not request.limit:
                aside.append(request)
                continue
            joined.append(request)
            while other := self._next(len(joined) + len(aside), like=request):
                joined.append(other)
                forks.append((request, other))
        return joined, aside, forks

    def _next(self, new: int, like: Request | None = None) -> Request | None:
        """Who comes next, with the pages it needs to draw a token, if there is room for it.

        `new`: how many have come in this step. `like`: only one who can share that one's pages.
        """
        if not self._waiting or len(self._running) + new >= self.max_batch:
            return None
        request, pages = self._waiting[0], self._pages
        whole, rest = divmod(len(request.ids), self.block_size)
        if like is not None:
            same = request.params is like.params and request.prompt is like.prompt
            if request.ids != like.ids or (request.params.prompt_logprobs and not same):
                return None
            shared, node = like.blocks[:whole], 0
        elif request.wants_scores:  # every token of the prompt must be fed
            shared, node = [], 0
            request.prompt_logprobs, request.prompt_top_logprobs = [], []
        else:  # the last token must be fed
            parts = (self._part(request, i) for i in range(whole - (rest == 0)))
            shared, node = pages.find(parts)
        pages.share(shared)
        lacking = whole + (rest > 0) - len(shared)
        if lacking > pages.available:
            pages.release(shared)
            return None
        request.blocks = shared + [pages.take() for _ in range(lacking)]
        request.whole, request.node, request.fed = len(shared), node, 0
        request.held = len(shared) * self.block_size if like is None else len(request.ids)
        self._hits += 0 if like else request.held
        return self._waiting.popleft()

    def _part(self, request: Request, block: int) -> tuple[int, ...]:
        return tuple(request.ids[block * self.block_size : (block + 1) * self.block_size])

    def _join(
        self, first: int, joined: list[Request], aside: list[Request]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gives new sequences their rows, from `first` on.

        Returns the tokens of the step, where each row's begin, and each running row's last one.
        """
        new = joined + aside
        if joined:
            rows, integers, floats = slice(first, first + len(joined)), [], []
            for request in joined:
                p = request.params
                integers.append((0, len(request.ids), request.seed, p.top_k))
                penalties = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
                # Below 1e-6 it is 0: logits divided by it may overflow.
                temperature = p.temperature * (p.temperature >= 1e-6)
                floats.append((temperature, p.top_p, p.min_p, *penalties))
            self._integers[:, rows] = self._tensor(integers, torch.int64).T
            self._floats[:, rows] = self._tensor(floats, torch.float32).T
            self._view = None
            for row, request in enumerate(joined, first):
                self._fill(row, request)
        rows, width = slice(first, first + len(new)), max(len(r.blocks) for r in new)
        tables = [r.blocks + [-1] * (width - len(r.blocks)) for r in new]
        self._table[rows, :width] = self._tensor(tables, torch.int32)
        self._seqlens[rows] = self._tensor([r.held for r in new], torch.int32)
        fed = [id for r in new for id in r.ids[r.held : r.held + r.fed]]
        tokens = torch.cat((self._integers[0, :first], self._tensor(fed, torch.int64)))
        lengths = [1] * first + [r.fed for r in new]
        cu_seqlens = self._tensor([0, *accumulate(lengths)], torch.int32)
        # One who shares another's pages follows that one and is fed nothing: both end as one.
        return tokens, cu_seqlens, cu_seqlens[1 : first + len(joined) + 1].long() - 1

    def _settle(
        self, new: list[Request], forks: list[tuple[Request, Request]], hidden: Tensor
    ) -> list[Request]:
        """What follows from having fed new sequences; returns those who wanted nothing else."""
        done, at = [], 0
        for request in new:
            if request.wants_scores:
                self._score(request, hidden[at : at + request.fed])
            at += request.fed
            request.held += request.fed
            self._remember(request)
            if not request.limit and request.held == len(request.ids):
                request.finish("length")
                self._release(request)
                done.append(request)
        self._fed += at
        for request, other in forks:
            other.whole, other.node = request.whole, request.node
            other.prompt_logprobs = request.prompt_logprobs
            other.prompt_top_logprobs = request.prompt_top_logprobs
        split = [(a.blocks[-1], b.blocks[-1]) for a, b in forks if b.held % self.block_size]
        if split:  # each goes on with a page of its own
            source, target = self._tensor(split, torch.int64).T
            for pages in self._cache.keys + self._cache.values:
                pages[target] = pages[source]
        return done

    def _score(self, request: Request, hidden: Tensor) -> None:
        """Adds the log-probabilities of what in the prompt follows on the tokens just fed."""
        logprobs, tops = request.prompt_logprobs, request.prompt_top_logprobs
        if not logprobs:
            logprobs.append(None)
            tops.append(None)
        targets = request.prompt[request.held + 1 : request.held + request.fed + 1]
        for i in range(0, len(targets), SCORED_ROWS):
            part = self._tensor(targets[i : i + SCORED_ROWS], torch.int64)
            logits = self.model.logits(hidden[i : i + len(part)])
            logprobs += ops.token_logprobs(logits, part, entropy=False).logprobs.tolist()
            if request.params.top_logprobs:
                tops += _likeliest(logits, request.params.top_logprobs)

    def _remember(self, request: Request) -> None:
        """Whole pages may serve others."""
        while request.node is not None and (request.whole + 1) * self.block_size <= request.held:
            part, page = self._part(request, request.whole), request.blocks[request.whole]
            request.node = self._pages.remember(page, request.node, part)
            request.whole += 1

    def _draw(self, logits: Tensor) -> None:
        """Gives every running sequence its next token."""
        running, count = self._running, len(self._running)
        if self._view is None:
            self._view = self._look(count)
        drawn = ops.sample(logits, **self._view)
        columns = [values.tolist() for values in drawn]
        check(min(columns[0]) >= 0, "the model's logits are NaN: so are its weights")
        self._integers[0, :count] = drawn.tokens
        self._integers[1, :count] += 1
        if "counts" in self._wide:
            self._wide["counts"][:count].scatter_add_(1, drawn.tokens[:, None], self._ones[:count])
        wanted = [(i, r) for i, r in enumerate(running) if r.params.top_logprobs]
        if wanted:
            most = max(r.params.top_logprobs for _, r in wanted)
            tops = _likeliest(logits[[i for i, _ in wanted]], most)
            for (_, request), top in zip(wanted, tops, strict=True):
                request.top_logprobs.append(dict([*top.items()][: request.params.top_logprobs]))
        ended = False
        for row, (request, *values) in enumerate(zip(running, *columns, strict=True)):
            request.held = len(request.ids)  # they are all in the cache, and one more is to come
            if request.held % self.block_size == 0:
                self._remember(request)
            if request.accept(*values):
                self._release(request)
                ended = True
            elif len(request.logprobs) == request.params.min_tokens:
                self._fill(row, request)
        self._generated += count
        if ended:
            self._leave([request.completion is None for request in running])

    def _leave(self, keep: list[bool]) -> None:
        """Drops running sequences; the rows of the others close up."""
        rows = [i for i, kept in enumerate(keep) if kept]
        count = len(rows)
        if rows and rows[-1] >= count:
            at = self._tensor(rows, torch.int64)
            for columns in (self._integers, self._floats):
                columns[:, :count] = columns[:, at]
            for column in (self._table, self._seqlens, *self._wide.values()):
                column[:count] = column[at]
        self._running = [self._running[i] for i in rows]
        if not any(r.controls for r in self._running):
            self._wide = {}
        self._view = None

    # -- the rows' controls -----------------------------------------------------------------------

    def _fill(self, row: int, request: Request) -> None:
        """What a row needs of the controls of the vocabulary's width, and nothing of the others."""
        p, vocab = request.params, self.model.config.vocab_size
        for name in request.controls:
            if name not in self._wide:
                dtype, neutral = _WIDE[name]
                like = dict(dtype=dtype, device=self._device)
                self._wide[name] = torch.full((self.max_batch, vocab), neutral, **like)
        for name, values in self._wide.items():
            values[row] = _WIDE[name][1]
        if "bias" in request.controls:
            ids = self._tensor([*p.logit_bias], torch.int64)
            self._wide["bias"][row, ids] = self._tensor([*p.logit_bias.values()], torch.float32)
        if "allowed" in request.controls:
            allowed = self._wide["allowed"][row]
            if p.allowed_token_ids is not None:
                allowed[:] = False
                allowed[self._tensor(p.allowed_token_ids, torch.int64)] = True
            if len(request.logprobs) < p.min_tokens:
                allowed[self._tensor([*request.stop_ids], torch.int64)] = False
        if "seen" in request.controls:
            drawn = self._tensor(request.token_ids, torch.int64)
            self._wide["seen"][row, self._tensor(request.prompt, torch.int64)] = True
            self._wide["counts"][row] = torch.bincount(drawn, minlength=vocab).int()

    def _look(self, count: int) -> dict:
        """The controls of the running rows, as `ops.sample` takes them."""
        _, positions, seeds, top_k = self._integers[:, :count].unbind()
        temperature, top_p, min_p, *strengths = self._floats[:, :count].unbind()
        wide = {name: values[:count] for name, values in self._wide.items()}
        penalties = None
        if "seen" in wide:
            penalties = ops.Penalties(wide.pop("counts"), wide.pop("seen"), *strengths)
        single = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        return dict(**single, seeds=seeds, positions=positions, penalties=penalties, **wide)

    # -- memory -----------------------------------------------------------------------------------

    def _allocate(self) -> None:
        """The cache and the rows, unless those at hand fit the model as it is now."""
        model, config, size = self.model, self.model.config, self.block_size
        made_for = (model.embed.device, model.compute_dtype, config)
        if self._cache is not None and self._made_for == made_for:
            return
        self._made_for, self._device, self._weights = made_for, model.embed.device, None
        token = 2 * config.layers * config.kv_heads * config.head_dim * model.compute_dtype.itemsize
        longest = -(-config.context // size)
        fitting = min(self.max_batch * longest, self.cache_bytes // (token * size))
        self._pages = _Pages(max(longest, fitting))
        self._cache = KVCache(model, len(self._pages.holders), size, 0, longest)
        rows, device = self.max_batch, self._device
        # token (not yet in the cache), position of the next one in its sequence, seed, top_k
        self._integers = torch.zeros(4, rows, dtype=torch.int64, device=device)
        # temperature, top_p, min_p, and the repetition, presence and frequency penalties
        self._floats = torch.zeros(6, rows, dtype=torch.float32, device=device)
        self._table = torch.full((rows, longest), -1, dtype=torch.int32, device=device)
        self._seqlens = torch.zeros(rows, dtype=torch.int32, device=device)
        self._counting = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._ones = torch.ones(rows, 1, dtype=torch.int32, device=device)
        self._wide: dict[str, Tensor] = {}  # (rows, V) each: those of _WIDE that some row needs
        self._view: dict | None = None

    def _look_at_weights(self) -> None:
        """What was computed with other weights must not be found; nor what is still computed."""
        weights = [(p.data_ptr(), p._version) for p in self.model.parameters()]
        if weights != self._weights:
            self._weights = weights
            self._pages.forget()
            for request in [*self._running, *([self._partial] if self._partial else [])]:
                request.node = None

    def _tensor(self, values: Sequence, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self._device)


# Controls of the vocabulary's width: element type, and the value that changes nothing.
_WIDE = {
    "bias": (torch.float32, 0.0),
    "allowed": (torch.bool, True),
    "seen": (torch.bool, False),  # tokens of the prompt, and
    "counts": (torch.int32, 0),  # how often those of the response occur
}


def _likeliest(logits: Tensor, count: int) -> list[Top]:
    """Log-probabilities of each row's likeliest tokens, with the bits of `ops.sample`'s."""
    best = logits.topk(min(count, logits.shape[1]))
    first = ops.token_logprobs(logits, best.indices[:, 0], entropy=False).logprobs[:, None]
    # y - lse is formed as (y - max) - log(sum), and `first` is the negative log(sum).
    logprobs = (best.values - best.values[:, :1]) + first
    rows = zip(best.indices.tolist(), logprobs.tolist(), strict=True)
    return [dict(zip(*row, strict=True)) for row in rows]
