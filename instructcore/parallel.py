"""Data parallel: the processes that torchrun starts share the work of every step.

All of them hold the whole model and draw the same batch. Each computes its share of the batch's
parts, whose losses add up to the batch's; the gradients are summed, and all take the same optimiser
step. So N processes do what one would, but for the rounding of sums and the draws of dropout, and a
run may be resumed by another number of them. The first process alone writes files and prints. For a
process by itself, every function here is the plain call that it stands for.
"""

from __future__ import annotations

import atexit
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .config import check
from .errors import UserError

T, U = TypeVar("T"), TypeVar("U")

BUCKET = 1 << 25  # elements of the gradients that are summed at once


_joined = False


def launched() -> bool:
    """Whether torchrun, or what sets the same variables, started this process among others."""
    named = {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()
    return named and int(os.environ["WORLD_SIZE"]) > 1


def begin(device: torch.device) -> None:
    """Joins the other processes, if there are any; on a GPU each takes one of its own."""
    global _joined
    if not launched() or _joined:
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)  # its threads may abort a process that ends
    _joined = True
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def world() -> int:
    return dist.get_world_size() if _joined else 1


def share(parts: Iterable[T]) -> Iterator[T]:
    """This process's part of the parts: every `world()`-th."""
    return itertools.islice(parts, rank(), None, world())


def everywhere(function: Callable[[T], U], parts: Sequence[T]) -> list[U]:
    """[function(part) for part in parts], of which each process computes its share.

    The results travel pickled: numbers, lists, tensors that are `portable`.
    """
    found = [function(part) for part in share(parts)]
    if world() == 1:
        return found
    shares: list = [None] * world()
    dist.all_gather_object(shares, found)
    return [shares[i % world()][i // world()] for i in range(len(parts))]


def portable(x: Tensor) -> Tensor:
    """x as another process can take it: on the CPU, where there are others."""
    return x if world() == 1 else x.cpu()


def first(function: Callable[[], T]) -> T:
    """What the function returns in the first process, the only one to call it; all wait for it.

    A user's mistake that it finds is raised there; the others end in silence.
    """
    if world() == 1:
        return function()
    found: list = [None, None]
    if rank() == 0:
        try:
            found[0] = function()
        except (UserError, OSError) as error:
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1] if rank() == 0 else SystemExit(2)
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
    cuts = itertools.pairwise(len(items) * i // world() for i in range(world() + 1))
    return [items[first:end] for first, end in cuts if first < end]


def micro_batch_size(size: int, batch: int, name: str = "batch") -> int:
    """How much of a batch is computed at once: `size`, or if it is 0 a process's whole share."""
    own, n = batch // world(), world()
    check(own * n == batch, f"--{name} must be a multiple of the {n} processes, got {batch}")
    share = f"the share of each process in --{name}"
    check(not size or own % size == 0, f"--micro-batch must divide {share}, got {size} and {own}")
    return size or own
