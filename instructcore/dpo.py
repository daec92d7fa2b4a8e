"""Direct preference optimisation: a policy learns from rankings, without reward model or samples.

What the policy makes of a response y to a prompt x is measured against the model it began as:

    r(x, y) = β (log π(y | x) − log π_ref(y | x)),   sums over the tokens of y, its EOS included
    loss    = mean over prompts of  1 / pairs · Σ over pairs (w better than l) ℓ(r_w − r_l)

    sigmoid:  ℓ(m) = −(1 − ε) log σ(m) − ε log σ(−m)
    ipo:      ℓ(m) = (m / β − 1 / (2 β))²

With ε = 0, sigmoid is equation 7 of Rafailov et al. 2023 (arXiv:2305.18290); with the share ε of
wrong labels it is Mitchell's conservative DPO. ipo is equation 17 of Azar et al. 2023
(arXiv:2310.12036). As in reward.py, all K responses to a prompt are one batch element, K forwards
for C(K, 2) pairs, and ties are no pairs.

π_ref is evaluated along with π, by the same forward on the same packed micro-batch: before the
first update all margins are exactly 0, and afterwards the rounding of the two cancels. Values
computed once and kept would belong to other batches, and spare work from the second epoch on only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, parallel
from .config import OptimConfig, RunConfig, check, check_divides, check_options, group, option
from .data import EpochOrder, Packed, pack, pieces
from .model import GPT, load
from .pretrain import to_device
from .reward import Ranking, order_accuracy, pairs_end_to_end, read_rankings
from .tokenizer import Tokenizer
from .train import AdamW, Metrics, Run, TrainState, optimise, resolve_checkpoint

# Means over the pairs, weighted as in the loss; an accuracy counts equal rewards half.
FIGURES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


@dataclass(frozen=True)
class DPOConfig:
    """Settings of `instructcore dpo`; its paper is Rafailov et al. 2023."""

    init: str = option(
        "",
        "checkpoint to begin with, an SFT model; frozen, the reference",
        required=True,
        metavar="CKPT",
    )
    data: tuple[str, ...] = option(
        (), "JSONL files of ranked responses", required=True, metavar="FILE"
    )
    val_fraction: float = option(0.1, "the prompts held out", unit="share", range="[0, 1)")
    epochs: int = option(1, "passes over the prompts", range="[1, inf)")
    batch: int = option(
        32, "prompts per step, with all their responses", paper="64", range="[1, inf)"
    )
    micro_batch: int = option(0, "prompts at once, 0 = all; must divide batch", range="[0, inf)")
    overlong: str = option(
        "drop",
        "prompts longer than the context with a response",
        choices=("drop", "truncate", "error"),
    )
    beta: float = option(
        0.1, "β, how near the policy is kept to the reference", paper="0.1", range="(0, inf)"
    )
    loss: str = option("sigmoid", "the loss of a pair", choices=("sigmoid", "ipo"))
    label_smoothing: float = option(
        0.0, "ε, labels taken to be wrong, of sigmoid alone", unit="share", range="[0, 0.5)"
    )
    length_normalised: bool = option(False, "log-ratios are means over the tokens, not sums")
    eval_every: int = option(
        0, "time between held-out accuracies, 0 = at the end", unit="steps", range="[0, inf)"
    )
    optim: OptimConfig = group(
        OptimConfig,
        lr=1e-5,
        schedule="constant",
        warmup=0.1,
        weight_decay=0.0,
        paper={
            "lr": "1e-6",
            "schedule": "constant",
            "warmup": "150 steps",
            "warmup_from": "0",
            "beta1": "",  # RMSprop
            "beta2": "",
        },
    )
    run: RunConfig = group(RunConfig)

    def __post_init__(self) -> None:
        check_options(self)
        if self.micro_batch:
            check_divides(self.micro_batch, self.batch, ("micro-batch", "batch"))
        smooth = self.label_smoothing
        check(self.loss == "sigmoid" or not smooth, f"--label-smoothing {smooth} is of sigmoid")


def pair_loss(margins: Tensor, config: DPOConfig) -> Tensor:
    """ℓ of the margins r_w − r_l, elementwise."""
    if config.loss == "ipo":
        return ((margins - 0.5) / config.beta) ** 2
    wrong = config.label_smoothing
    return (wrong - 1) * F.logsigmoid(margins) - wrong * F.logsigmoid(-margins)


def run(config: DPOConfig) -> Path:
    """Runs the stage; returns the final checkpoint."""
    run, seed = Run.open("dpo", config), config.run.seed
    if run.finished:
        return run.final
    micro_batch = parallel.micro_batch_size(config.micro_batch, config.batch)
    path = resolve_checkpoint(config.init, "sft")
    tokenizer = Tokenizer.load(path)
    policy, reference = (load(path, dtype=run.dtype, device=run.device) for _ in range(2))
    check(policy.head == "lm", f"--init {path} is a reward model: it cannot write responses")
    check(
        tokenizer.eos_id is not None and tokenizer.assistant_id is not None,
        f"--init {path} does not know where a response begins and ends: run sft on it first",
    )
    policy.eval()  # no dropout: comparisons are between responses, not between noises
    reference.eval().requires_grad_(False)

    rankings, held_out = read_rankings(config, tokenizer, policy.config.context)
    check(
        len(rankings) >= config.batch,
        f"--batch must be at most the {len(rankings)} prompts to train on, got {config.batch}",
    )
    order, steps = EpochOrder(len(rankings), seed), config.epochs * len(rankings) // config.batch
    optimizer = AdamW(policy, config.optim)
    run.start(TrainState({"": policy}, {"": optimizer}, tokenizer), steps)

    def step(index: int) -> Metrics:
        chosen, figures = [rankings[i] for i in order.batch(index, config.batch)], []

        def losses() -> Iterator[Tensor]:
            for part in parallel.share(pieces(chosen, micro_batch)):
                found = batch_loss(policy, reference, part, config.batch, config)
                figures.append(found.figures)
                yield found.loss

        metrics = optimise(optimizer, config.optim, index, steps, losses())
        metrics |= zip(FIGURES, parallel.total(sum(figures)).tolist(), strict=True)
        return metrics | {"tokens": sum(len(row) for ranking in chosen for row in ranking.rows)}

    with reference.frozen():
        run.loop(
            step,
            evaluate=(lambda: evaluate(policy, reference, held_out, config)) if held_out else None,
            eval_every=config.eval_every,
            show=("rewards/accuracies", "rewards/margins"),
        )
    return run.finish()


def response_logprobs(model: GPT, packed: Packed) -> Tensor:
    """log π (N,) of the responses' tokens, each at the position before it; 0 elsewhere."""
    hidden = model.hidden(packed.tokens, packed.cu_seqlens, max_seqlen=packed.max_seqlen)
    targets = packed.targets
    return ops.linear_token_logprobs(hidden, model.head_weight, targets, entropy=False).logprobs


class BatchLoss(NamedTuple):
    """What a part of a batch gives."""

    loss: Tensor  # its share of the batch's loss
    rewards: Tensor  # (R,) of all responses, without gradient
    figures: Tensor  # (6,) its share of FIGURES


def batch_loss(
    policy: GPT, reference: GPT, rankings: Sequence[Ranking], prompts: int, config: DPOConfig
) -> BatchLoss:
    """The loss of these prompts' share of a batch of `prompts`."""
    rows = [(row, ranking.begin) for ranking in rankings for row in ranking.rows]
    masks = [[False] * begin + [True] * (len(row) - begin) for row, begin in rows]
    packed = pack([(row, mask) for (row, _), mask in zip(rows, masks, strict=True)])
    packed, lengths = to_device(packed, policy.embed.device), [len(mask) for mask in masks]
    with torch.no_grad():
        base = response_logprobs(reference, packed)
    ours = response_logprobs(policy, packed)
    # Differences first: what is equal in both, token by token, leaves no rounding behind.
    ratios = sums(ours - base, lengths)
    if config.length_normalised:
        ratios = ratios / ratios.new_tensor([sum(mask) for mask in masks])
    rewards, logps = config.beta * ratios, sums(ours.detach(), lengths)
    better, worse, weight = pairs_end_to_end(rankings, prompts, ratios.device)
    margins = rewards[better] - rewards[worse]
    loss = (weight * pair_loss(margins, config)).sum()

    won, lost, margins = (x.detach() for x in (rewards[better], rewards[worse], margins))
    right = 0.5 * ((margins > 0).float() + (margins >= 0).float())
    figures = torch.stack([won, lost, right, margins, logps[better], logps[worse]]) @ weight
    return BatchLoss(loss, rewards.detach(), figures)


def sums(values: Tensor, lengths: list[int]) -> Tensor:
    """(R,) sums of R consecutive parts of `values`."""
    return torch.stack([part.sum() for part in values.split(lengths)])


@torch.no_grad()
def evaluate(
    policy: GPT, reference: GPT, rankings: Sequence[Ranking], config: DPOConfig
) -> Metrics:
    """Held-out loss, and how well the rewards order the pairs."""
    parts = list(pieces(rankings, parallel.micro_batch_size(config.micro_batch, config.batch)))

    def measure(part: Sequence[Ranking]) -> tuple[float, list[float]]:
        found = batch_loss(policy, reference, part, len(rankings), config)
        return float(found.loss), found.rewards.tolist()

    with policy.frozen():
        found = parallel.everywhere(measure, parts)
    losses, rewards = zip(*found, strict=True)
    return {"val_loss": sum(losses)} | order_accuracy(rankings, chain.from_iterable(rewards))
