"""Generation: prompts in, responses with their log-probabilities out; and the commands for it.

`Generator` runs a `Scheduler` to the end; `score` asks the trainer's forward about given texts.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ops
from .config import check, check_new_file, check_options, group, option
from .data import Prompt, read_prompts
from .errors import UserError
from .model import GPT
from .scheduler import Completion, Piece, Request, SamplingParams, Scheduler
from .tokenizer import Tokenizer
from .train import load_checkpoint, mix

SCORED_AT_ONCE = 16384  # tokens per forward of `score`


class Generator:
    """Continues prompts with a model, whose weights it shares.

    Args:
        model: a GPT with head "lm".
        tokenizer: for texts, stop strings and the end-of-text token.
        limits: of the `Scheduler`: max_batch, prefill_tokens, cache_bytes, block_size.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, **limits: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.scheduler = Scheduler(model, tokenizer, **limits)

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
            pieces = [r.take()._replace(index=i) for i, r in unfinished.items()]
            for piece in pieces:
                if piece.completion:
                    del unfinished[piece.index]
            yield [piece for piece in pieces if piece.token_ids or piece.completion]

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

    def encode(self, prompts: Sequence[Prompt], marked: bool) -> list[list[int]]:
        """Token ids of texts, with the assistant marker if `marked`.

        Raises:
            UserError: one cannot be continued; the message names its file and line.
        """
        encode = self.tokenizer.prompt_ids if marked else self.tokenizer.encode
        ids = [encode(prompt.text) for prompt in prompts]
        for prompt, row in zip(prompts, ids, strict=True):
            try:
                self.scheduler.check_prompt(row)
            except UserError as error:
                where = f"{prompt.where}: " if prompt.where else ""
                raise UserError(f"{where}{error}") from None
        return ids

    def _all_requests(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
    ) -> list[Request]:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        pairs = zip(prompts, each, strict=True)
        return [r for prompt, p in pairs for r in self.scheduler.requests(prompt, p)]

    def _run(self, requests: Sequence[Request]) -> Iterator[None]:
        """Completes the requests, unless it is closed; yields after every step."""
        unfinished = deque(requests)
        self.scheduler.queue(requests)
        try:
            with self.model.frozen():
                while unfinished:
                    self.scheduler.advance()
                    while unfinished and unfinished[0].completion:
                        unfinished.popleft()
                    yield
        finally:
            self.scheduler.abort(*unfinished)


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
    return model.extra.get("stage") in ("sft", "dpo", "ppo")


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


class _Speaker:
    """A generator that takes texts."""

    def __init__(self, config: GenerateConfig | ChatConfig) -> None:
        model, self.tokenizer = load_checkpoint(config.checkpoint, config.device, config.dtype)
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
