"""Generation: token ids in, sampled ids with their log-probabilities out.

Sequences share a batch without padding. A step feeds every running sequence its last token and
every new one its whole prompt, in one packed forward; keys and values lie in pages of a common
cache. A finished sequence leaves at once, and a waiting one takes its place. Three parts:

    _Request  what is asked for and what has come of it, on the host
    _Rows     what a step needs of each running sequence: tensors with a row each
    _Batch    admits requests, runs steps, owns the cache and its free pages

A completion is a function of its prompt and its parameters alone: the noise that draws a token
depends on the seed, the position and the token, not on the batch.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .config import check, check_new_file, check_options, group, option
from .data import Prompt, read_prompts
from .errors import UserError
from .model import GPT, KVCache, load
from .tokenizer import Tokenizer
from .train import choose_device, choose_dtype, mix, resolve_checkpoint

SCORED_AT_ONCE = 16384  # tokens per forward of `score`


@dataclass(frozen=True)
class SamplingParams:
    """How a prompt is continued. Truncations apply in the order top_k, top_p, min_p."""

    max_tokens: int = option(128, "longest response", unit="tokens", range="[1, inf)")
    temperature: float = option(1.0, "0 = always the likeliest token", range="[0, inf)")
    top_k: int = option(0, "only the k likeliest tokens, 0 = all", unit="tokens", range="[0, inf)")
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
        1.0, "divides the logit of tokens already there, 1 = off", range="(0, inf)"
    )
    presence_penalty: float = option(0.0, "off the logit of tokens of the response", unit="nats")
    frequency_penalty: float = option(0.0, "the same, times how often they occur", unit="nats")

    def __post_init__(self) -> None:
        check_options(self)
        check(
            not isinstance(self.stop, str) and all(self.stop),
            f"stop must be a tuple of strings that are not empty, got {self.stop!r}",
        )

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


class Completion(NamedTuple):
    """A response."""

    token_ids: list[int]  # as sampled: with the end-of-text token that ended it, if one did
    logprobs: list[float]  # of these tokens, from the raw logits at temperature 1
    sampled_logprobs: list[float]  # from the distribution they were drawn from
    finish_reason: str  # "stop": by a stop token or string; "length": at a limit
    text: str  # without special tokens; up to the stop string


class Piece(NamedTuple):
    """What a step added to a response."""

    index: int  # of the response, in the order of `generate`
    text: str  # whole characters, which never run into a stop string
    completion: Completion | None  # the whole response, once it is complete


class Generator:
    """Continues prompts with a model, whose weights it shares.

    Args:
        model: a GPT with head "lm".
        tokenizer: for texts, stop strings and the end-of-text token.
        max_batch: most sequences at once; the others wait.
        prefill_tokens: most prompt tokens in a step (a longer prompt goes alone).
        cache_bytes: most memory for keys and values (a sequence that needs more still runs, alone).
        block_size: tokens in a page of the cache.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 128,
        prefill_tokens: int = 8192,
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

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    ) -> list[Completion]:
        """Completions of all prompts, in their order, the `n` of one prompt side by side.

        Equal prompts with equal seeds get equal responses: give each its own seed.

        Raises:
            UserError: a prompt is empty, leaves no room in the context or holds an unknown id.
        """
        requests = self._all_requests(prompts, params)
        for _ in self._run(requests):
            pass
        return [request.completion for request in requests]

    def follow(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    ) -> Iterator[list[Piece]]:
        """What `generate` does, seen after every step; closing the iterator stops it.

        The texts of a response's pieces join to the text of its completion, which the last one has.
        """
        requests = self._all_requests(prompts, params)
        unfinished = dict(enumerate(requests))
        for _ in self._run(requests):
            pieces = [Piece(i, r.text.take(), r.completion) for i, r in unfinished.items()]
            yield [piece for piece in pieces if piece.text or piece.completion]
            unfinished = {i: r for i, r in unfinished.items() if not r.completion}

    def stream(
        self, prompt: Sequence[int], params: SamplingParams = SamplingParams()
    ) -> Iterator[str]:
        """The text of one completion piece by piece; the iterator's return value is the Completion.

        A piece consists of whole characters and never runs into a stop string.
        """
        for pieces in self.follow([prompt], replace(params, n=1)):
            for piece in pieces:
                if piece.text:
                    yield piece.text
        return piece.completion

    def _all_requests(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
    ) -> list[_Request]:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        pairs = zip(prompts, each, strict=True)
        return [r for prompt, p in pairs for r in self._requests(prompt, p)]

    def check_prompt(self, prompt: Sequence[int]) -> list[int]:
        """The ids of a prompt; a UserError if it cannot be continued."""
        config = self.model.config
        try:
            ids = list(map(index, prompt))
        except TypeError:
            want = "a prompt must be token ids, such as those of tokenizer.prompt_ids(text)"
            raise UserError(f"{want}, got {prompt!r:.60}") from None
        check(len(ids) > 0, "a prompt needs at least one token, got an empty one")
        check(
            len(ids) < config.context,
            f"a prompt must be shorter than the context of {config.context} tokens, got {len(ids)}",
        )
        last = config.vocab_size - 1
        check(
            0 <= min(ids) and max(ids) <= last,
            f"token ids must be in 0 .. {last}, got {min(ids)} .. {max(ids)}",
        )
        return ids

    def encode(self, prompts: Sequence[Prompt], marked: bool) -> list[list[int]]:
        """Token ids of texts, with the assistant marker if `marked`.

        Raises:
            UserError: one cannot be continued; the message names its file and line.
        """
        encode = self.tokenizer.prompt_ids if marked else self.tokenizer.encode
        ids = [encode(prompt.text) for prompt in prompts]
        for prompt, row in zip(prompts, ids, strict=True):
            try:
                self.check_prompt(row)
            except UserError as error:
                where = f"{prompt.where}: " if prompt.where else ""
                raise UserError(f"{where}{error}") from None
        return ids

    def _requests(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[_Request]:
        config, prompt = self.model.config, self.check_prompt(prompt)
        last = config.vocab_size - 1
        stop_ids = frozenset(params.stop_token_ids)
        check(
            all(0 <= id <= last for id in stop_ids),
            f"stop_token_ids must be in 0 .. {last}, got {params.stop_token_ids}",
        )
        if not params.ignore_eos:
            stop_ids |= self.eos_ids
        limit = min(params.max_tokens, config.context - len(prompt))
        for sample in range(params.n):
            if params.seed is None:  # from torch's generator, which the caller may have seeded
                seed = int(torch.randint(1 << 62, ()))
            else:
                seed = mix(params.seed, sample) if sample else params.seed
            # The last token of a response is never fed, so it needs no place in the cache.
            pages = -(-(len(prompt) + limit - 1) // self.block_size)
            text = _Text(self.tokenizer, params)
            yield _Request(prompt, params, seed, limit, pages, stop_ids, text)

    @torch.no_grad()
    def _run(self, requests: Sequence[_Request]) -> Iterator[None]:
        """Completes the requests; yields after every step."""
        if not requests:
            return
        batch = _Batch(self, requests)
        waiting = deque(requests)
        with self._evaluating():
            while waiting or batch.running:
                batch.step(batch.admit(waiting))
                yield

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with self.model.frozen():
                yield
        finally:
            self.model.train(training)


@dataclass(eq=False)
class _Request:
    """One response to be."""

    prompt: list[int]
    params: SamplingParams
    seed: int
    limit: int  # most tokens of the response
    pages: int  # of the cache, for prompt and response
    stop_ids: frozenset[int]
    text: _Text
    blocks: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    completion: Completion | None = None

    def accept(self, id: int, logprob: float, sampled_logprob: float) -> bool:
        """Takes in the next token; whether more are to come."""
        check(id >= 0, "the model's logits are NaN: so are its weights")
        self.token_ids.append(id)
        self.logprobs.append(logprob)
        self.sampled_logprobs.append(sampled_logprob)
        ended = self.text.feed(id) or id in self.stop_ids
        if not ended and len(self.token_ids) < self.limit:
            return True
        record = (self.token_ids, self.logprobs, self.sampled_logprobs)
        self.completion = Completion(*record, "stop" if ended else "length", self.text.finish())
        return False


class _Text:
    """The text of ids as they come, up to the first stop string to be complete.

    What may be the beginning of a stop string is held back.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._stream, self._stops = tokenizer.stream(), params.stop
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


class _Rows(NamedTuple):
    """The running sequences, a row each; int64 (B,) on the model's device unless noted."""

    token: Tensor  # the last one, not yet in the cache
    position: Tensor  # of the next token in its sequence
    seed: Tensor
    top_k: Tensor
    floats: Tensor  # (B, 6) float32: temperature, top_p, min_p and the three penalties
    block_table: Tensor  # (B, max_blocks) int32
    seqlens: Tensor  # int32: tokens in the cache
    seen: Tensor  # (B, V) bool: tokens of the prompt, and
    counts: Tensor  # (B, V) int32: of the response; where no request has penalties, (B, 0)


class _Batch:
    """The running sequences and their cache."""

    def __init__(self, generator: Generator, requests: Sequence[_Request]) -> None:
        self.generator, self.model = generator, generator.model
        self.device, config = self.model.embed.device, self.model.config
        needs = sorted((r.pages for r in requests), reverse=True)
        size = self.model.compute_dtype.itemsize * generator.block_size
        page = 2 * config.layers * config.kv_heads * config.head_dim * size
        together = sum(needs[: generator.max_batch])
        pages = max(needs[0], min(together, generator.cache_bytes // page))
        self.free, self.max_blocks = list(range(pages)), needs[0]
        self.cache = KVCache(self.model, pages, generator.block_size, 0, self.max_blocks)
        self.running: list[_Request] = []
        self.rows: _Rows | None = None
        self.counting = self._tensor(range(generator.max_batch + 1), torch.int32)
        self.has_minimum = any(r.params.min_tokens for r in requests)
        self.penalised = any(r.params.penalised for r in requests)

    def admit(self, waiting: deque[_Request]) -> list[_Request]:
        """Takes from `waiting` who fits: a row, pages to its end, and a share of this step."""
        new: list[_Request] = []
        tokens = 0
        while waiting and len(self.running) + len(new) < self.generator.max_batch:
            request = waiting[0]
            tokens += len(request.prompt)
            crowded = new and tokens > self.generator.prefill_tokens
            if crowded or request.pages > len(self.free):
                break
            request.blocks = [self.free.pop() for _ in range(request.pages)]
            new.append(waiting.popleft())
        return new

    def step(self, new: list[_Request]) -> None:
        """One forward: the next token of every running sequence, the first one of the new ones."""
        if new:
            tokens, cu_seqlens = self._join(new)
        else:
            tokens, cu_seqlens = self.rows.token, self.counting[: len(self.running) + 1]
        rows, cache = self.rows, self.cache
        cache.block_table, cache.seqlens = rows.block_table, rows.seqlens
        hidden = self.model.decode(tokens, cu_seqlens, cache)
        if new:
            hidden = hidden[cu_seqlens[1:].long() - 1]
        drawn = self._sample(self.model.logits(hidden))
        self.rows = rows._replace(
            token=drawn.tokens, position=rows.position + 1, seqlens=cache.seqlens
        )
        columns = zip(self.running, *(values.tolist() for values in drawn), strict=True)
        keep = [i for i, (request, *values) in enumerate(columns) if request.accept(*values)]
        if len(keep) < len(self.running):
            for request in self.running:
                self.free += request.blocks if request.completion else []
            index = self._tensor(keep, torch.int64)
            self.rows = _Rows(*(column[index] for column in self.rows))
            self.running = [self.running[i] for i in keep]

    def _sample(self, logits: Tensor) -> ops.Sampled:
        rows = self.rows
        temperature, top_p, min_p, *strengths = rows.floats.unbind(1)
        allowed = penalties = None
        if self.has_minimum:
            allowed = torch.ones(logits.shape, dtype=torch.bool, device=self.device)
            for i, request in enumerate(self.running):
                if len(request.token_ids) < request.params.min_tokens:
                    allowed[i, list(request.stop_ids)] = False
        if self.penalised:
            penalties = ops.Penalties(rows.counts, rows.seen, *strengths)
        drawn = ops.sample(
            logits,
            temperature=temperature,
            top_k=rows.top_k,
            top_p=top_p,
            min_p=min_p,
            seeds=rows.seed,
            positions=rows.position,
            penalties=penalties,
            allowed=allowed,
        )
        if self.penalised:
            once = torch.ones_like(rows.counts[:, :1])
            rows.counts.scatter_add_(1, drawn.tokens.clamp(min=0)[:, None], once)
        return drawn

    def _join(self, new: list[_Request]) -> tuple[Tensor, Tensor]:
        """Adds rows; returns the tokens of the step and where those of each row begin."""
        integers, floats, tables = [], [], []
        seen = torch.zeros(
            len(new), self.model.config.vocab_size if self.penalised else 0, dtype=torch.bool
        )
        for i, r in enumerate(new):
            p = r.params
            integers.append((0, len(r.prompt), r.seed, p.top_k))
            penalties = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
            floats.append((p.temperature, p.top_p, p.min_p, *penalties))
            tables.append(r.blocks + [-1] * (self.max_blocks - len(r.blocks)))
            if self.penalised:
                seen[i, r.prompt] = True
        seen = seen.to(self.device)
        rows = _Rows(
            *self._tensor(integers, torch.int64).unbind(1),
            self._tensor(floats, torch.float32),
            self._tensor(tables, torch.int32),
            self._tensor([0] * len(new), torch.int32),
            seen,
            torch.zeros_like(seen, dtype=torch.int32),
        )
        tokens = self._tensor([id for r in new for id in r.prompt], torch.int64)
        lengths = [1] * len(self.running) + [len(r.prompt) for r in new]
        if self.running:
            tokens = torch.cat((self.rows.token, tokens))
            rows = _Rows(*map(torch.cat, zip(self.rows, rows, strict=True)))
        self.rows = rows
        self.running += new
        return tokens, self._tensor([0, *accumulate(lengths)], torch.int32)

    def _tensor(self, values: Sequence, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)


@torch.no_grad()
def score(model: GPT, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """log p(token t + 1 | tokens 0 .. t) of each sequence, by the trainer's forward.

    Returns:
        float32 (length - 1,) for each; without gradient.
    """
    scores: list[Tensor] = []
    with model.frozen():
        for part in _parts(sequences):
            tokens = torch.tensor([id for ids in part for id in ids], device=model.embed.device)
            lengths = [len(ids) for ids in part]
            starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            targets = tokens.roll(-1)
            targets[starts[1:].long() - 1] = -100
            hidden = model.hidden(tokens, starts.to(tokens.device), max_seqlen=max(lengths))
            found = ops.linear_token_logprobs(hidden, model.head_weight, targets, entropy=False)
            scores += [row[:-1] for row in found.logprobs.split(lengths)]
    return scores


def _parts(sequences: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Consecutive sequences of at most SCORED_AT_ONCE tokens, or one."""
    part: list[Sequence[int]] = []
    for ids in sequences:
        check(len(ids) > 0, "score: a sequence needs at least one token, got an empty one")
        if part and sum(map(len, part)) + len(ids) > SCORED_AT_ONCE:
            yield part
            part = []
        part.append(ids)
    if part:
        yield part


# ---- The commands


def is_instructed(model: GPT) -> bool:
    """Whether a checkpoint was tuned to answer: then an assistant marker belongs after a prompt."""
    return model.extra.get("stage") in ("sft", "ppo")


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of `instructcore generate`."""

    checkpoint: str = option("", "a checkpoint, run or quickstart", positional=True, required=True)
    prompt: str = option("", "a prompt")
    prompts: str = option("", "or a file of prompts: JSONL, or one a line")
    out: str = option("", "file for the responses, as JSONL; not given: the terminal")
    raw: bool = option(False, "no assistant marker after prompts, even if the checkpoint wants it")
    sampling: SamplingParams = group(SamplingParams)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "dtype to compute in", choices=("auto", "float32", "bfloat16"))

    def __post_init__(self) -> None:
        check_options(self)
        check(bool(self.checkpoint), "generate needs a checkpoint")
        check(bool(self.prompt) != bool(self.prompts), "give either --prompt or --prompts")


@dataclass(frozen=True)
class ChatConfig:
    """Settings of `instructcore chat`."""

    checkpoint: str = option("", "a checkpoint, run or quickstart", positional=True, required=True)
    raw: bool = option(False, "no assistant marker after what you say")
    sampling: SamplingParams = group(SamplingParams, hide=("n",))
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "dtype to compute in", choices=("auto", "float32", "bfloat16"))

    def __post_init__(self) -> None:
        check_options(self)
        check(bool(self.checkpoint), "chat needs a checkpoint")


class _Speaker:
    """A generator that takes texts."""

    def __init__(self, config: GenerateConfig | ChatConfig) -> None:
        path = resolve_checkpoint(config.checkpoint)
        device = choose_device(config.device)
        model = load(path, dtype=choose_dtype(config.dtype, device), device=device)
        self.tokenizer = Tokenizer.load(path)
        self.generator = Generator(model, self.tokenizer)
        self.context = model.config.context
        self.instructed = is_instructed(model) and not config.raw

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.prompt_ids(text) if self.instructed else self.tokenizer.encode(text)

    def say(self, ids: list[int], params: SamplingParams) -> Completion:
        """Prints a completion as it comes."""
        stream = self.generator.stream(ids, params)
        while True:
            try:
                print(next(stream), end="", flush=True)
            except StopIteration as end:
                print(flush=True)
                return end.value


def run(config: GenerateConfig) -> list[dict[str, Any]]:
    """Answers the prompts; returns a record per response, which `out` gets as a line of JSON."""
    check_new_file(config.out)
    out = Path(config.out) if config.out else None
    params = config.sampling
    prompts = read_prompts([config.prompts]) if config.prompts else [Prompt(config.prompt, {})]
    speaker = _Speaker(config)
    ids = speaker.generator.encode(prompts, speaker.instructed)
    if len(prompts) == params.n == 1 and out is None:
        completions = [speaker.say(ids[0], params)]
    else:
        each = [params] * len(prompts)
        if params.seed is not None and len(prompts) > 1:
            each = [replace(params, seed=mix(params.seed, i)) for i in range(len(prompts))]
        completions = speaker.generator.generate(ids, each)
    records = [
        {
            "prompt": prompts[i // params.n].text,
            "response": c.text,
            "finish_reason": c.finish_reason,
            "tokens": len(c.token_ids),
            "logprob": sum(c.logprobs),
        }
        for i, c in enumerate(completions)
    ]
    if out is not None:
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        out.write_text("".join(lines), encoding="utf-8")
        print(f"{len(records)} responses in {out}")
    elif len(records) > 1:
        for record in records:
            print(f"> {record['prompt']}\n{record['response']}\n")
    return records


def chat(config: ChatConfig) -> None:
    """A conversation: what was said stays before what is said next, as the context allows."""
    speaker, params = _Speaker(config), config.sampling
    if not speaker.instructed:
        print("This checkpoint is not tuned to answer: it continues text.", file=sys.stderr)
    turns: list[list[int]] = []
    for line in _lines():
        if line.strip() == "/quit":
            return
        asked = speaker.encode(line)
        room = speaker.context - min(params.max_tokens, speaker.context // 4)
        while turns and len(asked) + sum(map(len, turns)) > room:
            turns.pop(0)
        try:
            completion = speaker.say([id for turn in turns for id in turn] + asked, params)
        except KeyboardInterrupt:  # an answer that goes on too long: forget it
            print()
            continue
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            print(f"instructcore: error: {error}", file=sys.stderr)
            continue
        answer = completion.token_ids
        end = speaker.tokenizer.eos_id
        if speaker.instructed and answer[-1] != end:
            answer = [*answer, end]
        turns.append(asked + answer)


def _lines() -> Iterator[str]:
    """What the user types, until the end of input or Ctrl-C; all of stdin if it is no terminal."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    print("/quit or Ctrl-D ends the conversation, Ctrl-C an answer.")
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip():
            yield line
