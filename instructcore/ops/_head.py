"""The language-model head's GEMMs, a chunk of rows at a time, for the ops fused with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._common import check_device, check_float, check_shape, fresh_pages, last_contiguous
from .linear import multiply, multiply_input, multiply_weight, sum_rows

SLAB_BYTES = 4 << 20  # of a 16-bit weight as float32, at a time; at most a quarter of the whole


def workspace_bytes(hidden: Tensor, max_workspace_bytes: int | None) -> int:
    """The bound, by default 64 MiB, and 1 GiB on CUDA, whose GEMMs want many rows."""
    if max_workspace_bytes is None:
        return 1 << 30 if hidden.is_cuda else 64 << 20
    return int(max_workspace_bytes)


def cut(tensor: Tensor, part: slice) -> Tensor:
    """tensor[part], the tensor itself where that is all of it: a view costs a microsecond."""
    return tensor if part.stop - part.start == tensor.shape[0] else tensor[part]


class Head:
    """float32 logits of hidden (N, C) with weight (V, C), and the gradients back through them.

    `grads` are those of hidden, weight and bias, to be filled, None where not needed. `rows` says
    which rows count (`live_rows`).

    On the CPU the GEMMs are `linear`'s, which take any pair of types: a row's logits have the bits
    of `linear` in every chunk. On CUDA they are torch's: 16-bit matrices whose product is wanted in
    float32 are multiplied as they are, or the weight goes as float32 slabs where the other matrix
    is float32. Gradients are formed in float32, and grad_hidden is rounded once, to hidden's type;
    but for bfloat16 hidden and weight the GEMMs of the backward take the logits' gradient as
    bfloat16. grad_weight sums chunks in float32.

    The workspace: a slab, two rows of the vocabulary (bias and its gradient), and for each row of a
    chunk its logits, their gradient where it is bfloat16, and at most 8 bytes a channel for copies
    of hidden and of its gradient.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: LiveRows,
        max_workspace_bytes: int,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    ):
        self.ours = not hidden.is_cuda
        self.hidden, self.index = hidden, rows.index
        self.weight = last_contiguous(weight) if self.ours else weight
        self.bias = None if bias is None else bias.float()
        vocab, channels = weight.shape
        self.grad_hidden, self.grad_weight, self.grad_bias = grads
        trained = any(g is not None for g in grads)
        self.low = trained and hidden.dtype == weight.dtype == torch.bfloat16
        self.dead = rows.dead if self.grad_weight is not None else None
        self.rows = len(hidden) if self.index is None else len(self.index)
        self.mixed = hidden.dtype == weight.dtype != torch.float32  # two 16-bit matrices
        self.slab, self.wide = vocab, None
        budget = max_workspace_bytes - 8 * vocab
        if not self.ours and self.mixed and trained and not self.low:
            slab_bytes = min(SLAB_BYTES, max_workspace_bytes // 4)
            self.slab = min(vocab, max(1, slab_bytes // (4 * channels)))
            self.wide = weight.new_empty((self.slab, channels), dtype=torch.float32)
            budget -= 4 * self.wide.numel()
        per_row = (6 if self.low else 4) * vocab + 8 * channels
        chunks = -(-self.rows // max(1, budget // per_row))
        self.step = -(-self.rows // max(1, chunks))
        self.logits = fresh_pages(hidden.new_empty((self.step, vocab), dtype=torch.float32))
        self.slopes = self.logits  # the logits' gradient, in their place
        if self.low:
            self.slopes = fresh_pages(hidden.new_empty((self.step, vocab)))
        if self.grad_hidden is not None and (self.index is not None or not self.rows):
            self.grad_hidden.zero_()
        if not self.rows:
            for grad in (self.grad_weight, self.grad_bias):
                if grad is not None:
                    grad.zero_()

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, logits, slopes): fill `slopes` with the logits' gradient, then call `back`."""
        for first in range(0, self.rows, max(1, self.step)):
            n = min(self.step, self.rows - first)
            rows = slice(first, first + n)
            self.input = None  # before the next one is made
            self.input = self._rows_of(self.hidden, rows)
            if self.dead is not None:  # NaN there, times 0, would spoil the weights' gradient
                self.input = self.input.masked_fill(cut(self.dead, rows)[:, None], 0.0)
            logits = cut(self.logits, slice(0, n))
            if self.ours:
                self.input = last_contiguous(self.input)
                multiply(self.input, self.weight, self.bias, logits)
            else:
                self._project(logits)
            yield rows, logits, cut(self.slopes, slice(0, n))

    def back(self, rows: slice, slopes: Tensor) -> None:
        """Adds what the chunk just yielded gives to the gradients."""
        keep = 0 if rows.start == 0 else 1  # the first chunk overwrites
        if self.grad_hidden is not None:
            self._back_hidden(rows, slopes)
        if self.grad_weight is not None:
            self._back_weight(slopes, keep)
        if self.grad_bias is None:
            return
        if self.ours:
            sum_rows(slopes, self.grad_bias, bool(keep))
            return
        if self.low:  # here, or sum would make a float32 copy
            slopes = cut(self.logits, slice(0, len(slopes))).copy_(slopes)
        total = slopes.sum(0)
        self.grad_bias.add_(total) if keep else self.grad_bias.copy_(total)

    def _rows_of(self, tensor: Tensor, rows: slice) -> Tensor:
        return cut(tensor, rows) if self.index is None else tensor[cut(self.index, rows)]

    def _parts(self) -> Iterator[slice]:
        vocab = self.weight.shape[0]
        return (slice(v, min(v + self.slab, vocab)) for v in range(0, vocab, self.slab))

    def _slabs(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in float32, a part after the other; the next one takes its place."""
        for part in self._parts():
            weight = cut(self.weight, part)
            if self.wide is not None:
                weight = cut(self.wide, slice(0, len(weight))).copy_(weight)
            yield part, weight

    def _columns(self, tensor: Tensor, part: slice) -> Tensor:
        return tensor if self.slab == tensor.shape[1] else tensor[:, part]

    def _project(self, logits: Tensor) -> None:
        if self.mixed:
            torch.mm(self.input, self.weight.t(), torch.float32, out=logits)
            if self.bias is not None:
                logits += self.bias
            return
        inputs = self.input.float()
        if self.bias is None:
            torch.mm(inputs, self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, inputs, self.weight.t(), out=logits)

    def _back_weight(self, slopes: Tensor, keep: int) -> None:
        if self.ours:
            multiply_weight(slopes, self.input, self.grad_weight, bool(keep))
            return
        inputs = self.input if self.low else self.input.float()
        for part in self._parts():
            to, by = cut(self.grad_weight, part), self._columns(slopes, part).t()
            if self.low:
                torch.addmm(to, by, inputs, torch.float32, beta=keep, out=to)
            else:
                torch.addmm(to, by, inputs, beta=keep, out=to)

    def _back_hidden(self, rows: slice, slopes: Tensor) -> None:
        to = out = cut(self.grad_hidden, rows)
        dtype = to.dtype if self.ours or self.low else torch.float32
        if self.index is not None or dtype != to.dtype:
            out = torch.empty_like(to, dtype=dtype)
        if self.ours:
            multiply_input(slopes, self.weight, out)
        elif self.low:
            torch.mm(slopes, self.weight, out=out)
        else:
            for part, weight in self._slabs():
                columns = self._columns(slopes, part)
                torch.addmm(out, columns, weight, beta=int(part.start > 0), out=out)
        if self.index is not None:
            self.grad_hidden.index_copy_(0, self.index[rows], out.to(to.dtype))
        elif out is not to:
            to.copy_(out)


def allocate_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Unfilled, empty where not needed: hidden's in its type, the others float32."""
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,), dtype=torch.float32),
        weight.new_empty(bias.shape if needs[2] else (0,), dtype=torch.float32),
    )


def needed(
    grads: tuple[Tensor, Tensor, Tensor], needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What `allocate_gradients` gave, None for the empty ones, for `Head` to fill."""
    return tuple(fresh_pages(g) if need else None for g, need in zip(grads, needs, strict=True))


def check_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    max_workspace_bytes: int,
) -> None:
    check_float(op, hidden=hidden, weight=weight, bias=bias)
    if weight.dtype not in (hidden.dtype, torch.float32):
        raise TypeError(f"{op}: weight must be {hidden.dtype} or float32, got {weight.dtype}")
    if hidden.ndim != 2 or weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"{op}: hidden must be (N, C) and weight (V, C), got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    vocab, channels = weight.shape
    check_shape(op, (hidden.shape[0], channels), hidden=hidden)
    check_shape(op, (hidden.shape[0],), targets=targets)
    check_shape(op, (vocab,), bias=bias)
    check_device(op, hidden, weight=weight, targets=targets, bias=bias)
    if max_workspace_bytes <= 0:
        raise ValueError(f"{op}: max_workspace_bytes must be above 0, got {max_workspace_bytes}")


class LiveRows(NamedTuple):
    """The rows that count: their indices, or which ones do not; None is all, and none."""

    index: Tensor | None
    dead: Tensor | None


def live_rows(live: int, targets: Tensor, mask: Tensor | None, ignore_index: int) -> LiveRows:
    """What `live` of the rows, neither ignored nor masked, leave to do.

    On the CPU the others stay out of the GEMMs. On CUDA nobody waits to count them (live < 0), and
    they take part, as zeros where the weights' gradient is formed.
    """
    if live == len(targets):
        return LiveRows(None, None)
    kept = targets != ignore_index
    if mask is not None:
        kept &= mask
    if live < 0:
        return LiveRows(None, ~kept)
    return LiveRows(kept.nonzero()[:, 0], None)


__all__ = [
    "Head",
    "LiveRows",
    "allocate_gradients",
    "check_head",
    "cut",
    "live_rows",
    "needed",
    "workspace_bytes",
]
