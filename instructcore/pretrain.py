"""Pre-training: a language model learns to continue raw text.

Rows are windows of tokens, as long as the context unless told otherwise, cut at random places of
the training text. Attention does not cross from one document into the next. The held-out loss is
the mean over all tokens of the held-out part, in consecutive windows that each begin from an empty
context.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from . import ops, parallel
from .config import (
    OptimConfig,
    RunConfig,
    check,
    check_divides,
    check_options,
    flatten,
    group,
    option,
    options,
)
from .data import IGNORED, Packed, TokenStream, read_documents
from .model import GPT, ModelConfig, load
from .tokenizer import Tokenizer
from .train import AdamW, Metrics, Run, TrainState, mix, optimise, resolve_checkpoint


def next_token_loss(model: GPT, packed: Packed, count: int) -> Tensor:
    """Σ −log p(target) over the tokens that have a target, divided by `count`; a 0-d tensor.

    With `count` the targets of the whole batch, the losses of its micro-batches add up to its mean.
    """
    hidden = model.hidden(packed.tokens, packed.cu_seqlens, max_seqlen=packed.max_seqlen)
    total = ops.linear_cross_entropy(hidden, model.head_weight, packed.targets, reduction="sum")
    return total / count


@torch.no_grad()
def held_out_loss(model: GPT, batches: Iterable[Packed]) -> float:
    """Mean loss over all targets of all batches, in nats per token."""
    model.eval()
    total, count = torch.zeros(2, dtype=torch.float64).unbind()
    with model.frozen():
        for packed in parallel.share(batches):
            packed = to_device(packed, model.embed.device)
            total += next_token_loss(model, packed, 1).double().cpu()
            count += count_targets(packed)
    return float(parallel.total(total)) / max(1, int(parallel.total(count)))


def count_targets(packed: Packed) -> int:
    return int((packed.targets != IGNORED).sum())


def to_device(packed: Packed, device: torch.device) -> Packed:
    if device.type == "cpu":
        return packed
    tensors = (t.to(device, non_blocking=True) for t in packed[:3])
    return Packed(*tensors, packed.max_seqlen)


def micro_batches(packed: Packed, tokens: int) -> Iterator[Packed]:
    """Pieces of `tokens` tokens each, which begin where a sequence does."""
    for begin in range(0, len(packed.tokens), tokens):
        end = begin + tokens
        cuts = packed.cu_seqlens
        cuts = cuts[(cuts >= begin) & (cuts <= end)] - begin
        yield Packed(packed.tokens[begin:end], cuts, packed.targets[begin:end], packed.max_seqlen)


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of `instructcore pretrain`."""

    data: tuple[str, ...] = option(
        (), "text files, or JSONL with a `text` each", required=True, metavar="FILE"
    )
    init: str = option("", "checkpoint to go on from, instead of a new model", metavar="CKPT")
    tokenizer: str = option(
        "bpe", "bytes, bpe (trained on the data), or a tokenizer.json", metavar="bytes|bpe|FILE"
    )
    vocab_size: int = option(
        8192, "vocabulary of a trained bpe tokenizer", unit="tokens", range="[260, inf)"
    )
    val_fraction: float = option(
        0.1, "the end of each file, held out", unit="share", range="[0, 1)"
    )
    steps: int = option(2000, "length of the run", unit="steps", range="[1, inf)")
    batch: int = option(32, "windows per step", unit="sequences", range="[1, inf)")
    window: int = option(0, "length of a window, 0 = context", unit="tokens", range="[0, inf)")
    micro_batch: int = option(
        0, "windows at once, 0 = all; must divide batch", unit="sequences", range="[0, inf)"
    )
    eval_every: int = option(
        0, "time between held-out losses, 0 = at the end", unit="steps", range="[0, inf)"
    )
    model: ModelConfig = group(ModelConfig, hide=("vocab_size",))
    optim: OptimConfig = group(OptimConfig, lr=2e-3, warmup=0.05)
    run: RunConfig = group(RunConfig)
    given: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        check_options(self)
        if self.micro_batch:
            check_divides(self.micro_batch, self.batch, ("micro-batch", "batch"))


def run(config: PretrainConfig) -> Path:
    """Runs the stage; returns the final checkpoint."""
    run = Run.open("pretrain", config)
    if run.finished:
        return run.final
    micro_batch = parallel.micro_batch_size(config.micro_batch, config.batch)
    model, tokenizer = _model(config, run)
    context, window = model.config.context, config.window or model.config.context
    check(window <= context, f"--window must be at most the context of {context}, got {window}")
    train, held_out = TokenStream.build(
        config.data, tokenizer, run.directory / "tokens", config.val_fraction, window=window
    )
    optimizer = AdamW(model, config.optim)
    run.start(TrainState({"": model}, {"": optimizer}, tokenizer), config.steps)

    def step(index: int) -> Metrics:
        model.train()
        packed = train.batch(index, config.run.seed, config.batch, window)
        tokens, count = len(packed.tokens), count_targets(packed)
        parts = parallel.share(micro_batches(packed, micro_batch * window))
        losses = (next_token_loss(model, to_device(part, run.device), count) for part in parts)
        return optimise(optimizer, config.optim, index, config.steps, losses) | {"tokens": tokens}

    def evaluate() -> Metrics:
        windows = held_out.windows(window, max(1, 8192 // window))
        return {"val_loss": held_out_loss(model, windows)}

    run.loop(step, evaluate=evaluate if config.val_fraction else None, eval_every=config.eval_every)
    return run.finish()


def _model(config: PretrainConfig, run: Run) -> tuple[GPT, Tokenizer]:
    """The model and tokenizer to begin with: those of --init, or new ones."""
    if config.init:
        path = resolve_checkpoint(config.init, "pretrain")
        model, tokenizer = load(path, dtype=run.dtype, device=run.device), Tokenizer.load(path)
        brought = {"tokenizer", *vars(config.model)} - {"dropout"}
        items, settings = options(PretrainConfig), flatten(config)
        changed = [
            item.flag
            for item in items
            if item.name in brought
            and (item.name in config.given or settings[item.name] != item.default)
        ]
        flags = f"{', '.join(changed)} cannot be set beside it"
        check(not changed, f"--init brings the tokenizer and the model's shape: {flags}")
        model.config = replace(model.config, dropout=config.model.dropout)
        return model, tokenizer
    if config.tokenizer == "bytes":
        tokenizer = Tokenizer.bytes()
    elif config.tokenizer == "bpe":
        tokenizer = parallel.first(
            lambda: Tokenizer.train(read_documents(config.data), config.vocab_size)
        )
    else:
        tokenizer = Tokenizer.load(config.tokenizer)
    shape = replace(config.model, vocab_size=tokenizer.vocab_size)
    generator = torch.Generator().manual_seed(mix(config.run.seed, -1))
    return GPT(shape, dtype=run.dtype, generator=generator).to(run.device), tokenizer
