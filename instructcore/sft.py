"""Supervised fine-tuning: a language model learns to answer as the demonstrations do.

A row is `prompt <|assistant|> response <|eos|>`, or several such turns; the loss is on the
responses alone. Rows are packed end to end without padding. Pre-training text can be mixed in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import parallel
from .config import OptimConfig, RunConfig, check, check_divides, check_options, group, option
from .data import (
    EpochOrder,
    Packed,
    TokenStream,
    encode_demonstrations,
    pack,
    pieces,
    read_demonstrations,
)
from .model import load
from .pretrain import count_targets, held_out_loss, micro_batches, next_token_loss, to_device
from .tokenizer import Tokenizer
from .train import AdamW, Metrics, Run, TrainState, mix, optimise, resolve_checkpoint


def split(items: list, fraction: float, seed: int) -> tuple[list, list]:
    """(training, held-out) items: a random `fraction`, at least one if it is not 0, is held out."""
    generator = torch.Generator().manual_seed(mix(seed, -2))
    order = torch.randperm(len(items), generator=generator).tolist()
    held_out = max(1, round(len(items) * fraction)) if fraction else 0
    return [items[i] for i in order[held_out:]], [items[i] for i in order[:held_out]]


@dataclass(frozen=True)
class SFTConfig:
    """Settings of `instructcore sft`."""

    init: str = option("", "checkpoint to begin with", required=True, metavar="CKPT")
    data: tuple[str, ...] = option(
        (), "JSONL files of demonstrations", required=True, metavar="FILE"
    )
    val_fraction: float = option(0.05, "the demonstrations held out", unit="share", range="[0, 1)")
    epochs: int = option(2, "passes over the demonstrations", paper="16", range="[1, inf)")
    batch: int = option(
        32, "demonstrations per step", unit="sequences", paper="32", range="[1, inf)"
    )
    micro_batch: int = option(
        0, "demonstrations at once, 0 = all", unit="sequences", range="[0, inf)"
    )
    overlong: str = option(
        "drop", "rows longer than the context", choices=("drop", "truncate", "error")
    )
    dropout: float = option(
        0.0, "residual dropout", unit="probability", paper="0.2", range="[0, 1)"
    )
    pretrain_data: tuple[str, ...] = option((), "pre-training text to mix in", metavar="FILE")
    pretrain_mix: float = option(
        0.1, "that text", unit="share of the tokens", paper="0.1 before PPO", range="[0, 1)"
    )
    eval_every: int = option(
        0, "time between held-out losses, 0 = an epoch", unit="steps", range="[0, inf)"
    )
    optim: OptimConfig = group(
        OptimConfig,
        lr=1e-4,
        warmup=0.03,
        paper={
            "lr": "9.65e-6 for 1.3B",
            "schedule": "cosine",
            "min_lr_ratio": "0.1",
            "warmup": "none",
        },
    )
    run: RunConfig = group(RunConfig)

    def __post_init__(self) -> None:
        check_options(self)
        if self.micro_batch:
            check_divides(self.micro_batch, self.batch, ("micro-batch", "batch"))


def run(config: SFTConfig) -> Path:
    """Runs the stage; returns the final checkpoint."""
    run, seed = Run.open("sft", config), config.run.seed
    if run.finished:
        return run.final
    micro_batch = parallel.micro_batch_size(config.micro_batch, config.batch)
    path = resolve_checkpoint(config.init, "pretrain")
    tokenizer, model = Tokenizer.load(path), load(path, dtype=run.dtype, device=run.device)
    tokenizer.add_specials()
    model.resize_vocab(tokenizer.vocab_size, torch.Generator().manual_seed(mix(seed, -1)))
    model.config = replace(model.config, dropout=config.dropout)
    context = model.config.context

    rows = encode_demonstrations(
        read_demonstrations(config.data), tokenizer, context, config.overlong
    )
    rows, held_out = split(rows, config.val_fraction, seed)
    check(
        len(rows) >= config.batch,
        f"--batch must be at most the {len(rows)} demonstrations to train on, got {config.batch}",
    )
    order, steps_per_epoch = EpochOrder(len(rows), seed), len(rows) / config.batch
    steps = int(config.epochs * steps_per_epoch)
    text, windows_per_step, window = None, 0.0, min(context, max(len(ids) for ids, _ in rows))
    if config.pretrain_data:
        text, _ = TokenStream.build(
            config.pretrain_data, tokenizer, run.directory / "tokens", 0.0, window=window
        )
        tokens = sum(len(ids) for ids, _ in rows) / steps_per_epoch
        windows_per_step = config.pretrain_mix / (1 - config.pretrain_mix) * tokens / window
    optimizer = AdamW(model, config.optim)
    run.start(TrainState({"": model}, {"": optimizer}, tokenizer), steps)

    def batches(index: int) -> Iterator[Packed]:
        """The micro-batches of a step."""
        chosen = [rows[i] for i in order.batch(index, config.batch)]
        yield from map(pack, pieces(chosen, micro_batch))
        windows = int((index + 1) * windows_per_step) - int(index * windows_per_step)
        if text is not None and windows:
            each = -(-windows // parallel.world())
            yield from micro_batches(text.batch(index, seed, windows, window), each * window)

    def step(index: int) -> Metrics:
        model.train()
        parts = list(batches(index))
        count = sum(count_targets(part) for part in parts)
        own = (to_device(part, run.device) for part in parallel.share(parts))
        losses = (next_token_loss(model, part, count) for part in own)
        metrics = optimise(optimizer, config.optim, index, steps, losses)
        return metrics | {"tokens": sum(len(part.tokens) for part in parts)}

    def evaluate() -> Metrics:
        return {"val_loss": held_out_loss(model, map(pack, pieces(held_out, micro_batch)))}

    run.loop(
        step,
        evaluate=evaluate if held_out else None,
        eval_every=config.eval_every or int(steps_per_epoch),
        eval_first=True,
    )
    return run.finish()
