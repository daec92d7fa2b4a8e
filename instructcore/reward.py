"""Reward model: a score per response, learned from rankings (Ouyang et al. 2022, section 3.5).

All K responses to a prompt are scored in one batch element, K forwards for C(K, 2) comparisons:

    loss = mean over prompts of  −1 / pairs · Σ over pairs (w better than l) log σ(r_w − r_l)

where a pair of equal rank is no pair. A response's score is read at its last token, the EOS.
After training the bias is set so that demonstrations score 0 on average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import parallel
from .config import OptimConfig, RunConfig, check, check_divides, check_options, group, option
from .data import (
    Comparison,
    EpochOrder,
    encode_demonstrations,
    pack,
    pieces,
    read_comparisons,
    read_demonstrations,
    report_dropped,
)
from .errors import UserError
from .model import GPT, load
from .pretrain import to_device
from .sft import split
from .tokenizer import Tokenizer
from .train import AdamW, Metrics, Run, TrainState, mix, optimise, resolve_checkpoint

if TYPE_CHECKING:
    from .dpo import DPOConfig


def ranking_loss(scores: Tensor, better: Tensor, worse: Tensor, weight: Tensor) -> Tensor:
    """−Σ weight · log σ(scores[better] − scores[worse]); scores (R,), the rest (P,), one a pair.

    With weight 1 / (pairs of its prompt · prompts) this is the loss above.
    """
    return -(weight * F.logsigmoid(scores[better] - scores[worse])).sum()


class Ranking(NamedTuple):
    """The responses to one prompt as token ids, and who beats whom."""

    rows: list[list[int]]
    pairs: list[tuple[int, int]]  # (better, worse), ties left out
    best: int
    begin: int  # where the response begins, in every row
    source: Comparison  # as it was read


def pairs_of(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """All (better, worse) of a ranking, in which a lower rank is better and equal ones are tied."""
    indices = range(len(ranks))
    return [(i, j) for i in indices for j in indices if ranks[i] < ranks[j]]


def pairs_end_to_end(
    rankings: Sequence[Ranking], prompts: int, device: torch.device
) -> list[Tensor]:
    """better, worse, weight (P,) of `ranking_loss`, where the rows of the rankings lie end to end.

    The rankings are a part of a batch of `prompts`: the losses of its parts add up to its loss.
    """
    better, worse, weight, first = [], [], [], 0
    for ranking in rankings:
        better += [first + i for i, _ in ranking.pairs]
        worse += [first + j for _, j in ranking.pairs]
        weight += [1 / (len(ranking.pairs) * prompts)] * len(ranking.pairs)
        first += len(ranking.rows)
    return [torch.tensor(x, device=device) for x in (better, worse, weight)]


def response_scores(model: GPT, rows: list[list[int]]) -> Tensor:
    """(R,) scores of whole sequences, read at the last token of each."""
    packed = to_device(pack([(row, None) for row in rows]), model.embed.device)
    hidden = model.hidden(packed.tokens, packed.cu_seqlens, max_seqlen=packed.max_seqlen)
    return model.scores(hidden[packed.cu_seqlens[1:].long() - 1])


def accuracy(right: Sequence[float], pairs: Sequence[int]) -> tuple[float, float, float]:
    """Share of pairs ordered rightly and its 95 % interval, from the figures of each prompt.

    Pairs of one prompt are not independent. The variance of p = Σ right / Σ pairs is that of a
    ratio over the m prompts, v = m / (m − 1) · Σ (right_i − p · pairs_i)² / (Σ pairs_i)². The
    interval is Wilson's for the n independent pairs of the same variance, n = p (1 − p) / v: with
    z = 1.96, the shares q for which |p − q| <= z sqrt(q (1 − q) / n). They are never more than all
    pairs; and where p is 0 or 1, so that v tells nothing, they are the prompts: n = m.
    """
    m, total = len(pairs), sum(pairs)
    p, z = sum(right) / total, 1.96
    residual = sum((r - p * k) ** 2 for r, k in zip(right, pairs, strict=True))
    variance = residual * m / max(1, m - 1) / total**2
    n = min(total, p * (1 - p) / max(variance, 1e-12)) if 0 < p < 1 else m
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
    return p, max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class RewardConfig:
    """Settings of `instructcore reward`."""

    init: str = option("", "checkpoint to begin with: an SFT model", required=True, metavar="CKPT")
    data: tuple[str, ...] = option(
        (), "JSONL files of ranked responses", required=True, metavar="FILE"
    )
    demonstrations: tuple[str, ...] = option(
        (),
        "JSONL files whose responses are to score 0 on average; else the best of the data",
        metavar="FILE",
    )
    val_fraction: float = option(0.1, "the prompts held out", unit="share", range="[0, 1)")
    epochs: int = option(1, "passes over the prompts", paper="1", range="[1, inf)")
    batch: int = option(
        32, "prompts per step, with all their responses", paper="64", range="[1, inf)"
    )
    micro_batch: int = option(0, "prompts at once, 0 = all; must divide batch", range="[0, inf)")
    overlong: str = option(
        "drop",
        "prompts and demonstrations longer than the context with a response",
        choices=("drop", "truncate", "error"),
    )
    eval_every: int = option(
        0, "time between held-out accuracies, 0 = at the end", unit="steps", range="[0, inf)"
    )
    optim: OptimConfig = group(
        OptimConfig,
        lr=5e-5,
        warmup=0.03,
        paper={"lr": "9e-6", "schedule": "cosine", "min_lr_ratio": "0.1", "warmup": "none"},
    )
    run: RunConfig = group(RunConfig)

    def __post_init__(self) -> None:
        check_options(self)
        if self.micro_batch:
            check_divides(self.micro_batch, self.batch, ("micro-batch", "batch"))


def run(config: RewardConfig) -> Path:
    """Runs the stage; returns the final checkpoint."""
    run, seed = Run.open("reward", config), config.run.seed
    if run.finished:
        return run.final
    micro_batch = parallel.micro_batch_size(config.micro_batch, config.batch)
    path = resolve_checkpoint(config.init, "sft")
    tokenizer, trunk = Tokenizer.load(path), load(path, dtype=run.dtype, device=run.device)
    tokenizer.add_specials()
    trunk.resize_vocab(tokenizer.vocab_size, torch.Generator().manual_seed(mix(seed, -1)))
    model = trunk.to_scalar_head(torch.Generator().manual_seed(mix(seed, -3)))
    model.eval()  # no dropout: comparisons are between responses, not between noises
    context = model.config.context

    rankings, held_out = read_rankings(config, tokenizer, context)
    check(
        len(rankings) >= config.batch,
        f"--batch must be at most the {len(rankings)} prompts to train on, got {config.batch}",
    )
    if config.demonstrations:
        demonstrations = read_demonstrations(config.demonstrations)
        rows = encode_demonstrations(demonstrations, tokenizer, context, config.overlong)
        good = [ids for ids, _ in rows]
    else:
        good = [ranking.rows[ranking.best] for ranking in rankings]
    order, steps = EpochOrder(len(rankings), seed), config.epochs * len(rankings) // config.batch
    optimizer = AdamW(model, config.optim)
    run.start(TrainState({"": model}, {"": optimizer}, tokenizer), steps)

    def step(index: int) -> Metrics:
        chosen = [rankings[i] for i in order.batch(index, config.batch)]
        parts = parallel.share(pieces(chosen, micro_batch))
        losses = (batch_loss(model, part, config.batch)[0] for part in parts)
        metrics = optimise(optimizer, config.optim, index, steps, losses)
        return metrics | {"tokens": sum(len(row) for ranking in chosen for row in ranking.rows)}

    run.loop(
        step,
        evaluate=(lambda: evaluate(model, held_out, micro_batch)) if held_out else None,
        eval_every=config.eval_every,
    )
    model.score_bias -= mean_score(model, good)
    return run.finish()


def read_rankings(
    config: RewardConfig | DPOConfig, tokenizer: Tokenizer, context: int
) -> tuple[list[Ranking], list[Ranking]]:
    """(training, held-out) rankings of a stage."""
    rankings = encode(read_comparisons(config.data), tokenizer, context, config.overlong)
    return split(rankings, config.val_fraction, config.run.seed)


def encode(
    comparisons: Sequence[Comparison], tokenizer: Tokenizer, context: int, overlong: str
) -> list[Ranking]:
    """Comparisons as tokens; those whose responses are all tied teach nothing and are left out.

    `overlong` is that of data.encode_demonstrations: a cut response is scored where it is cut, and
    prompts that leave no room for a response are left out.
    """
    rankings, too_long, tied = [], 0, 0
    for comparison in comparisons:
        prompt, pairs = tokenizer.prompt_ids(comparison.prompt), pairs_of(comparison.ranks)
        responses = tokenizer.encode_batch(comparison.responses)
        rows = [prompt + response + [tokenizer.eos_id] for response in responses]
        if overlong == "truncate" and len(prompt) < context:
            rows = [row[:context] for row in rows]
        longest = max(map(len, rows))
        if longest > context and overlong == "error":
            where = comparison.where or "a comparison"
            raise UserError(f"{where}: {longest} tokens, more than the context of {context}")
        if longest > context:
            too_long += 1
        elif not pairs:
            tied += 1
        else:
            best = comparison.ranks.index(min(comparison.ranks))
            rankings.append(Ranking(rows, pairs, best, len(prompt), comparison))
    report_dropped(too_long, len(comparisons), "comparisons", context)
    if tied:
        print(f"{tied} of {len(comparisons)} prompts have tied responses alone: left out")
    check(bool(rankings), "no comparison to learn from: all of them are ties")
    return rankings


def batch_loss(model: GPT, rankings: Sequence[Ranking], prompts: int) -> tuple[Tensor, Tensor]:
    """(the ranking loss of these prompts' share of a batch of `prompts`, all their scores)."""
    scores = response_scores(model, [row for ranking in rankings for row in ranking.rows])
    return ranking_loss(scores, *pairs_end_to_end(rankings, prompts, scores.device)), scores


@torch.no_grad()
def evaluate(model: GPT, rankings: Sequence[Ranking], batch: int) -> Metrics:
    """Held-out loss, and how well the scores order the pairs."""

    def measure(part: Sequence[Ranking]) -> tuple[float, list[float]]:
        loss, scores = batch_loss(model, part, len(rankings))
        return float(loss), scores.tolist()

    with model.frozen():
        found = parallel.everywhere(measure, list(pieces(rankings, batch)))
    losses, scores = zip(*found, strict=True)
    return {"val_loss": sum(losses)} | order_accuracy(rankings, chain.from_iterable(scores))


def order_accuracy(rankings: Sequence[Ranking], scores: Iterable[float]) -> Metrics:
    """The share of pairs that the scores of all rows order as the labels do, ties half."""
    values, right = iter(scores), []
    for ranking in rankings:
        own = [next(values) for _ in ranking.rows]
        margins = [own[i] - own[j] for i, j in ranking.pairs]
        right.append(sum((m > 0) + 0.5 * (m == 0) for m in margins))
    p, low, high = accuracy(right, [len(ranking.pairs) for ranking in rankings])
    return {"accuracy": p, "accuracy_low": low, "accuracy_high": high}


@torch.no_grad()
def mean_score(model: GPT, rows: list[list[int]], batch: int = 64) -> float:
    """The mean score of whole sequences, `batch` of them at a time."""
    with model.frozen():
        parts = list(pieces(rows, batch))
        found = parallel.everywhere(lambda p: parallel.portable(response_scores(model, p)), parts)
    return float(torch.cat(found).double().mean())
