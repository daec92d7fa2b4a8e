"""Data parallel: the processes that torchrun starts share the work of every step.

All of them hold the whole model and draw the same batch. Each computes its share of the batch's
parts, whose losses add up to the batch's; the gradients are summed, and all take the same optimiser
step. So N processes do what one would, but for the rounding of sums, and a run may be resumed by
another number of them. The first process alone writes and prints. For a process by itself, every
function here is the plain call that it stands for.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .config import check

T, U = TypeVar("T"), TypeVar("U")

BUCKET = 1 << 25  # elements of the gradients that are summed at once


def begin(device: torch.device) -> None:
    """Joins the other processes, if torchrun started any; on a GPU each takes one of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(parts: Iterable[T]) -> Iterator[T]:
    """This process's part of the parts: every `world()`-th."""
    return itertools.islice(parts, rank(), None, world())


def everywhere(function: Callable[[T], U], parts: Sequence[T]) -> list[U]:
    """[function(part) for part in parts], of which each process computes its share.

    The results travel pickled: numbers, lists, tensors on the CPU.
    """
    found = [function(part) for part in share(parts)]
    if world() == 1:
        return found
    shares: list = [None] * world()
    dist.all_gather_object(shares, found)
    return [shares[i % world()][i // world()] for i in range(len(parts))]


def first(function: Callable[[], T]) -> T:
    """What the function returns in the first process, the only one to call it; all wait for it."""
    if world() == 1:
        return function()
    found = [function() if rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def total(x: Tensor) -> Tensor:
    """The sum of x over the processes."""
    if world() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return flag if world() == 1 else bool(total(torch.tensor(float(flag))))


def sum_gradients(gradients: Sequence[Tensor]) -> None:
    """Replaces gradients, in place, by their sums over the processes, the same bits in all."""
    if world() == 1:
        return
    ends = itertools.accumulate(g.numel() for g in gradients)
    rows = zip(gradients, ends, strict=True)
    for _, bucket in itertools.groupby(rows, key=lambda row: row[1] // BUCKET):
        parts = [gradient for gradient, _ in bucket]
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat)
        for part, summed in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
            part.copy_(summed.view_as(part))


def chunks(items: Sequence[T]) -> list[Sequence[T]]:
    """The items in consecutive pieces, one for each process, as equal as they can be."""
    cuts = [len(items) * i // world() for i in range(world() + 1)]
    return [items[begin:end] for begin, end in itertools.pairwise(cuts) if begin < end]


def micro_batch_size(size: int, batch: int, name: str = "batch") -> int:
    """How much of a batch is computed at once: `size`, or if it is 0 a process's whole share."""
    own, n = batch // world(), world()
    check(own * n == batch, f"--{name} must be a multiple of the {n} processes, got {batch}")
    share = f"the share of each process in --{name}"
    check(not size or own % size == 0, f"--micro-batch must divide {share}, got {size} and {own}")
    return size or own
