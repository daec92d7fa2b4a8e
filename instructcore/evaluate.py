"""Evaluation as the InstructGPT paper reports it: score, win rate, KL, length, end of text, loss.

A judge turns responses into scores: a reward model's checkpoint, a Python function on text, or the
bundled gold rule. PPO takes its rewards from the first two. Intervals are percentile bootstraps
over prompts: 95 %, 2,000 resamples, seeded.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from . import parallel
from .config import check, check_new_file, check_options, flatten, option
from .data import (
    Prompt,
    TokenStream,
    encode_demonstrations,
    is_demonstration,
    pack,
    pieces,
    read_demonstrations,
    read_prompts,
)
from .errors import UserError
from .generate import Completion, Generator, SamplingParams, is_instructed, score
from .model import GPT, load
from .pretrain import held_out_loss
from .reward import response_scores
from .tokenizer import Tokenizer
from .train import (
    choose_device,
    choose_dtype,
    load_checkpoint,
    mix,
    resolve_checkpoint,
    write_whole,
)

RESAMPLES = 2000
SCORED_AT_ONCE = 64  # sequences per forward


class Sample(NamedTuple):
    """A prompt and what a model said to it."""

    prompt: Prompt
    prompt_ids: list[int]
    completion: Completion

    @property
    def sequence(self) -> list[int]:
        return self.prompt_ids + list(self.completion.token_ids)

    @property
    def ended(self) -> bool:
        """Whether the response ended itself, rather than at the limit."""
        return self.completion.finish_reason == "stop"


# (prompts, responses, records) -> one score each; a record is the prompt's whole JSON line
RewardFunction = Callable[[list[str], list[str], list[dict]], Sequence[float]]
Judge = Callable[[Sequence[Sample]], list[float]]


# ---- Statistics


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean of values and its 95 % interval; NaN where there are none."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return Interval(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    means = [array[rng.integers(array.size, size=array.size)].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(array.mean()), float(low), float(high))


def paired_bootstrap(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Interval:
    """The mean of a − b and its interval; a[i] and b[i] answer the same prompt."""
    if len(a) != len(b):
        raise ValueError(f"paired_bootstrap: a and b must be equally long, got {len(a)}, {len(b)}")
    return bootstrap_interval([x - y for x, y in zip(a, b, strict=True)], seed)


def wins(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """1 where a beats b, 0 where b beats a, one half for a tie; the mean is a's win rate."""
    return [0.5 * ((x > y) + (x >= y)) for x, y in zip(a, b, strict=True)]


# ---- Samples and what is measured on them


def sample_responses(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    marked: bool | None = None,
) -> list[Sample]:
    """The `params.n` responses to each prompt, side by side. Prompt i has the stream (seed, i).

    `marked`: with the assistant marker after a prompt; None: if the model is tuned to answer.
    """
    generator = Generator(model, tokenizer)
    ids = generator.encode(prompts, is_instructed(model) if marked is None else marked)
    each = [params] * len(ids)
    if params.seed is not None:
        each = [replace(params, seed=mix(params.seed, i)) for i in range(len(ids))]

    def answer(part: Sequence[int]) -> list[Completion]:
        return generator.generate([ids[i] for i in part], [each[i] for i in part])

    completions = chain.from_iterable(parallel.everywhere(answer, parallel.chunks(range(len(ids)))))
    asked = [pair for pair in zip(prompts, ids, strict=True) for _ in range(params.n)]
    return [Sample(*pair, c) for pair, c in zip(asked, completions, strict=True)]


def score_samples(judge: Judge, samples: Sequence[Sample]) -> list[float]:
    """The judge's scores, of which each process asks for its share: a run of samples."""
    return list(chain.from_iterable(parallel.everywhere(judge, parallel.chunks(samples))))


def log_ratios(policy: GPT, reference: GPT, samples: Sequence[Sample]) -> list[float]:
    """Σ_t log π − log π_ref of each response, in nats, at temperature 1.

    Both read what the policy read, with or without the assistant marker.
    """
    sequences = [s.sequence for s in samples]
    pairs = zip(score(policy, sequences), score(reference, sequences), strict=True)
    return [
        float((ours.double() - theirs.double())[len(s.prompt_ids) - 1 :].sum())
        for s, (ours, theirs) in zip(samples, pairs, strict=True)
    ]


def mean_kl(policy: GPT, reference: GPT, samples: Sequence[Sample]) -> float:
    """KL(policy || reference): the mean of `log_ratios`, nats per response.

    An estimate of it only for samples that the policy drew at temperature 1, untruncated.
    """
    ratios = log_ratios(policy, reference, samples)
    return sum(ratios) / len(ratios) if ratios else math.nan


def reference_loss(model: GPT, tokenizer: Tokenizer, path: str, limit: int = 0) -> float:
    """Mean nats per token of the responses in a file's first lines, in the model's own form."""
    demonstrations = read_demonstrations([path])[: limit or None]
    context, marked = model.config.context, is_instructed(model)
    rows = encode_demonstrations(demonstrations, tokenizer, context, "error", marked=marked)
    return held_out_loss(model, map(pack, pieces(rows, SCORED_AT_ONCE)))


def text_loss(
    model: GPT, tokenizer: Tokenizer, paths: Sequence[str], window: int
) -> tuple[float, str]:
    """(mean nats per token of text that was held out, a digest of its tokens).

    The loss is `pretrain`'s `val_loss`: all tokens but the first, in consecutive windows of
    `window` tokens, each from an empty context. Equal digests: losses of the same tokens.
    """
    with tempfile.TemporaryDirectory() as directory:
        stream, _ = TokenStream.build(paths, tokenizer, directory, 0.0)
        loss = held_out_loss(model, stream.windows(window, max(1, 8192 // window)))
        return loss, hashlib.sha256(stream.tokens.data).hexdigest()


# ---- Judges


def make_judge(
    judge: str | RewardFunction, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype
) -> Judge:
    """The judge meant by "gold", a reward model's path, "module:function" or a function on text.

    `tokenizer` is that of the responses.
    """
    if callable(judge):
        return _function_judge(judge, getattr(judge, "__name__", "the reward function"))
    if judge == "gold":
        return _gold_judge
    if ":" in judge and not Path(judge).exists():
        return _function_judge(load_function(judge), judge)
    return ModelJudge(judge, tokenizer, device, dtype)


def load_function(name: str) -> Callable:
    """The function called `module:function`; the working directory's modules are found too."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot load the function {name}: {error}") from error
    check(callable(function), f"{name} must be a function, got {function!r}")
    return function


def _texts(samples: Sequence[Sample]) -> tuple[list[str], list[str], list[dict]]:
    texts = [s.completion.text for s in samples]
    return [s.prompt.text for s in samples], texts, [s.prompt.record for s in samples]


def _gold_judge(samples: Sequence[Sample]) -> list[float]:
    from .quickstart_data import judge

    prompts, responses, records = _texts(samples)
    graded = all("task" in record for record in records)
    check(graded, "the judge gold knows the quickstart's prompts only: theirs have a `task`")
    return judge(prompts, responses, records, [s.ended for s in samples])


def _function_judge(function: RewardFunction, name: str) -> Judge:
    def judge(samples: Sequence[Sample]) -> list[float]:
        scores = list(function(*_texts(samples)))
        found = f"got {len(scores)} for {len(samples)}"
        check(len(scores) == len(samples), f"{name} must return a score per response, {found}")
        try:
            return [float(value) for value in scores]
        except (TypeError, ValueError) as error:
            raise UserError(f"{name} must return numbers: {error}") from error

    return judge


class ModelJudge:
    """Scores of a reward model, read at a response's last token: its end, where it has one."""

    def __init__(
        self, name: str, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype
    ) -> None:
        path = resolve_checkpoint(name, "reward")
        self.name, self.own = name, Tokenizer.load(path)
        self.model = load(path, dtype=dtype, device=device).eval().requires_grad_(False)
        check(self.model.head == "scalar", f"{name} is no reward model: it has no scalar head")
        # Otherwise responses are encoded anew, from their text.
        self.same_tokens = _meanings(self.own) == _meanings(tokenizer)

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        rows = [self._encode(s) for s in samples]
        longest, context = max(map(len, rows), default=0), self.model.config.context
        where = f"the context of {context} tokens of {self.name}"
        check(longest <= context, f"prompt and response must fit {where}, got {longest}")
        parts = pieces(rows, SCORED_AT_ONCE)
        with torch.no_grad(), self.model.frozen():
            return [s for part in parts for s in response_scores(self.model, part).tolist()]

    def _encode(self, sample: Sample) -> list[int]:
        if self.same_tokens:  # with the marker, as it was trained, even if the writer had none
            marker = {self.own.assistant_id} - {None, *sample.prompt_ids[-1:]}
            return [*sample.prompt_ids, *marker, *sample.completion.token_ids]
        ids = self.own.prompt_ids(sample.prompt.text) + self.own.encode(sample.completion.text)
        return ids + [self.own.eos_id] if sample.ended else ids


def _meanings(tokenizer: Tokenizer) -> tuple:
    """What every id stands for."""
    ids = range(tokenizer.vocab_size)
    return tokenizer.eos_id, tokenizer.assistant_id, [tokenizer.token_bytes(i) for i in ids]


# ---- The command


@dataclass(frozen=True)
class EvalConfig:
    """Settings of `instructcore eval`."""

    checkpoints: tuple[str, ...] = option(
        (), "checkpoints; the others are compared with the first", positional=True, required=True
    )
    data: str = option("", "prompts; if with responses, their loss is taken too", required=True)
    judge: str = option("", "gold, a reward model's checkpoint, or module:function")
    reference: str = option("", "checkpoint that the KL is against, instead of the first")
    text: tuple[str, ...] = option((), "held-out text, as for pretrain", metavar="FILE")
    window: int = option(
        0, "length of its windows, 0 = the first's context", unit="tokens", range="[0, inf)"
    )
    limit: int = option(0, "only the first ones, 0 = all", unit="prompts", range="[0, inf)")
    max_tokens: int = option(128, "longest response", unit="tokens", range="[1, inf)")
    temperature: float = option(0.0, "of the responses judged, 0 = greedy", range="[0, inf)")
    seed: int = option(0, "seed of the samples and the bootstrap", range="[0, inf)")
    out: str = option("", "file for settings and figures, as JSON")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "dtype to compute in", choices=("auto", "float32", "bfloat16"))

    def __post_init__(self) -> None:
        check_options(self)
        check(bool(self.data), "--data is missing: a file of prompts")
        check(bool(self.text) or not self.window, "--window needs --text, which it cuts")


def run(config: EvalConfig, judge: RewardFunction | None = None) -> list[dict[str, Any]]:
    """Evaluates every checkpoint on the same prompts; prints a table and returns its rows."""
    check_new_file(config.out)
    device = choose_device(config.device)
    dtype, window = choose_dtype(config.dtype, device), config.window

    def load_policy(name: str) -> tuple[GPT, Tokenizer]:
        model, tokenizer = load_checkpoint(name, config.device, config.dtype)
        check(model.head == "lm", f"{name} is a reward model: it cannot answer prompts")
        return model.eval().requires_grad_(False), tokenizer

    prompts = read_prompts([config.data])[: config.limit or None]
    answered = is_demonstration(prompts[0])
    params = SamplingParams(config.max_tokens, config.temperature, seed=config.seed)
    against = config.reference or config.checkpoints[0]
    reference, its_tokenizer = load_policy(against)
    meanings = _meanings(its_tokenizer)
    base: list[float] = []
    before, tokens = 0.0, ""  # the first's loss of the text, and what tokens it read
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(config.checkpoints):
        model, tokenizer = (reference, its_tokenizer) if name == against else load_policy(name)
        samples = sample_responses(model, tokenizer, prompts, params)
        row: dict[str, Any] = {"checkpoint": name}
        if judge or config.judge:
            scores = make_judge(judge or config.judge, tokenizer, device, dtype)(samples)
            check(all(map(math.isfinite, scores)), "the judge's scores must be finite numbers")
            base = base or scores
            row["score"] = bootstrap_interval(scores, config.seed)
            row["win_rate"] = bootstrap_interval(wins(scores, base), config.seed)
        row["eos_rate"] = sum(s.ended for s in samples) / len(samples)
        row["length"] = sum(len(s.completion.token_ids) for s in samples) / len(samples)
        if answered:
            row["loss"] = reference_loss(model, tokenizer, config.data, config.limit)
        if config.text:
            window = window or model.config.context
            room = f"{model.config.context} of {name}"
            found = f"got {window}"
            check(window <= model.config.context, f"--window must fit the context {room}, {found}")
            row["text_loss"], digest = text_loss(model, tokenizer, config.text, window)
            if i == 0:
                before, tokens = row["text_loss"], digest
            row["tax"] = row["text_loss"] - before if digest == tokens else None
        same = _meanings(tokenizer) == meanings
        other = f"{name} has other tokens than {against}"
        check(same or not config.reference, f"no KL: {other}")
        if not same:
            print(f"no KL: {other}")
        elif i > 0 or config.reference:
            if config.temperature != 1:  # the KL is an expectation over the policy's own samples
                own = replace(params, temperature=1.0)
                samples = sample_responses(model, tokenizer, prompts, own)
            row["kl"] = bootstrap_interval(log_ratios(model, reference, samples), config.seed)
        rows.append(row)
    _print_table(rows, f"{len(prompts)} prompts of {config.data}")
    if config.out:
        plain = [{k: getattr(v, "_asdict", lambda v=v: v)() for k, v in r.items()} for r in rows]
        record = {**flatten(config), "n": len(prompts), "rows": plain}
        write_whole(Path(config.out), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return rows


def _print_table(rows: list[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    caption = "with 95 % intervals; win rate (a tie is one half) and tax (rise of the text loss) "
    caption += "are against the first; KL in nats per response, losses in nats per token: loss of "
    caption += "the responses given, text loss of the held-out text"
    keys = dict.fromkeys(key for row in rows for key in row)
    table = Table("", title=title, caption=caption)
    for row in rows:
        table.add_column(row["checkpoint"], overflow="fold")
    for key in [*keys][1:]:  # a measure a line: many columns would not fit a terminal
        cells = [_cell(row.get(key)) for row in rows]
        if any(cells):
            table.add_row(key.replace("_", " "), *cells)
    Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, Interval):
        return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"
    return "" if value is None else f"{value:.3f}"
