"""Memory of large outputs that stays mapped: csrc/pages.h."""

from __future__ import annotations

import gc
import os
import threading

import torch

from instructcore import _C
from instructcore.ops import cross_entropy
from instructcore.ops._common import reused_pages

MEGA = 1 << 20


def large(megabytes: int, dtype=torch.float32) -> torch.Tensor:
    return reused_pages(torch.empty(megabytes * MEGA // dtype.itemsize, dtype=dtype))


def test_memory_comes_back_and_is_never_shared():
    first, second = large(33), large(33)
    first.fill_(1)
    second.fill_(2)
    assert first.eq(1).all() and second.eq(2).all()
    at = {first.data_ptr(), second.data_ptr()}
    assert len(at) == 2 and all(p % (2 * MEGA) == 0 for p in at)
    kept = second[7:9]  # a view keeps the memory
    del first, second
    third, fourth = large(32), large(33)
    assert third.data_ptr() in at and fourth.data_ptr() not in at
    fourth.fill_(3)
    assert kept.eq(2).all()
    # A much smaller one does not take a large block.
    del third
    small = large(5)
    assert small.data_ptr() not in at


def test_small_tensors_are_torch_s():
    x = torch.empty(1000)
    assert reused_pages(x) is x


def test_a_capsule_that_nobody_takes_gives_its_memory_back():
    del (capsule := {0: _C.take_pages(48 * MEGA)})[0]
    gc.collect()
    assert not capsule
    x = large(48)
    address = x.data_ptr()
    del x
    assert large(48).data_ptr() == address


def test_threads_and_forks():
    def work(seed):
        for i in range(20):
            x = large(6).fill_(seed * 100 + i)
            y = large(7).fill_(-1)
            assert x.eq(seed * 100 + i).all() and y.eq(-1).all()

    failed = []

    def guarded(seed):
        try:
            work(seed)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # torch's own threads do not survive a fork
        os._exit(0 if large(6).fill_(5)[-1] == 5 else 1)
    for thread in threads:
        thread.join()
    assert os.waitpid(child, 0)[1] == 0 and not failed


def test_gradients_of_two_losses():
    logits = torch.randn(64, 32000, requires_grad=True)
    targets = torch.randint(0, 32000, (64,))
    first = torch.autograd.grad(cross_entropy(logits, targets), logits)[0]
    copy = first.clone()
    second = torch.autograd.grad(3 * cross_entropy(logits, targets), logits)[0]
    assert torch.equal(first, copy) and torch.allclose(second, 3 * first, rtol=1e-6)
    del first
    again = torch.autograd.grad(cross_entropy(logits, targets), logits)[0]
    assert torch.equal(again, copy)


def test_a_large_gradient_compiles():
    """Where the loss is scaled, too: torch allocates what its graph computes."""
    logits = torch.randn(64, 32000, requires_grad=True)
    targets = torch.randint(0, 32000, (64,))

    def loss(x):
        return 3 * cross_entropy(x, targets)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(logits), logits)
    assert torch.equal(found, torch.autograd.grad(loss(logits), logits)[0])
