"""attention against torch's scaled_dot_product_attention: dense, packed against padded, decode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from bench import Case
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from instructcore.ops import attention, attention_paged_, attention_varlen

# batch, heads, kv_heads, tokens, dim
DENSE = {
    "cpu": (
        (1, 8, 8, 2048, 64),
        (1, 8, 8, 2048, 128),
        (1, 8, 2, 2048, 64),
        (1, 8, 2, 2048, 128),
        (2, 8, 8, 1024, 64),
        (4, 8, 8, 256, 64),
        (4, 8, 8, 256, 128),
        (16, 4, 4, 64, 32),
    ),
    "cuda": (
        (1, 64, 8, 8192, 128),
        (1, 64, 8, 2048, 128),
        (4, 48, 48, 1024, 128),
        (1, 16, 16, 16384, 64),
    ),
}
# sequences, shortest, longest, heads, dim: the pipeline's batches of short sequences, and a long
# tail
PACKED = {
    "cpu": (
        (64, 1, 32, 4, 32),
        (12, 20, 128, 4, 32),
        (64, 20, 128, 4, 32),
        (16, 20, 1024, 8, 64),
        (16, 20, 1500, 4, 32),
    ),
    "cuda": ((16, 20, 4096, 32, 128),),
}
# batch, keys held, heads, kv_heads, dim
DECODE = {
    "cpu": (
        (1, 1024, 8, 2, 64),
        (1, 8192, 8, 2, 64),
        (8, 1024, 8, 2, 64),
        (8, 8192, 8, 2, 64),
        (64, 1024, 8, 2, 64),
        (64, 8192, 8, 2, 64),
        (8, 8192, 16, 4, 128),
    ),
    "cuda": ((32, 4096, 32, 8, 128), (1, 1024, 32, 4, 128)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RIVALS = {
    "cpu": {"SDPA": None},
    "cuda": {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION},
}


def rivals(device):
    """SDPA with each of its back ends."""

    def with_backend(backend):
        def run(*tensors, **options):
            with nullcontext() if backend is None else sdpa_kernel(backend):
                return sdpa(*tensors, **options)

        return run

    return {name: with_backend(backend) for name, backend in RIVALS[device].items()}


def trains(f, leaves, grad):
    """f() and the gradients of its leaves."""
    return lambda: torch.autograd.grad(f(), leaves, grad)


def both_passes(name, dtype, passes, flops, bytes_forward):
    """Cases for the forward alone and with the backward; each of `passes` is (f, leaves, grad)."""

    def alone(f):
        def run():
            with torch.no_grad():
                return f()

        return run

    # Backward: two products of the forward again as five, so 2.5 times its FLOPs; it reads q, k, v,
    # out, dout and writes three gradients: twice the forward's four tensors.
    variants = {variant: alone(f) for variant, (f, _, _) in passes.items()}
    yield Case(name, dtype, "fwd", variants, bytes=bytes_forward, flops=flops)
    variants = {variant: trains(*each) for variant, each in passes.items()}
    yield Case(name, dtype, "fwd+bwd", variants, bytes=3 * bytes_forward, flops=3.5 * flops)


def dense(shape, dtype, device):
    batch, heads, kv_heads, tokens, dim = shape
    kind = DTYPES[dtype]

    def leaf(n):
        return torch.randn(batch, tokens, n, dim, device=device).to(kind).requires_grad_()

    def heads_first(x):
        return x.detach().transpose(1, 2).contiguous().requires_grad_()

    leaves = [leaf(heads), leaf(kv_heads), leaf(kv_heads)]
    grad = torch.randn(batch, tokens, heads, dim, device=device).to(kind)
    theirs = [heads_first(x) for x in leaves]
    options = {"is_causal": True, "enable_gqa": heads != kv_heads}
    # Two products of 2 FLOPs over half of the square of pairs.
    flops = 2.0 * batch * heads * tokens**2 * dim
    size = 2 * batch * tokens * (heads + kv_heads) * dim * grad.element_size()
    their_grad = heads_first(grad).detach()
    passes = {"ours": (lambda: attention(*leaves), leaves, grad)}
    for name, f in rivals(device).items():
        passes[f"{name}, contiguous"] = (lambda f=f: f(*theirs, **options), theirs, their_grad)
    name = f"B{batch} H{heads}/{kv_heads} T{tokens} D{dim}"
    yield from both_passes(name, dtype, passes, flops, size)


def packed(shape, dtype, device):
    batch, shortest, longest, heads, dim = shape
    kind = DTYPES[dtype]
    fixed = torch.Generator().manual_seed(0)
    if longest > 1000:  # lognormal: half of the padded batch is padding
        lengths = torch.randn(batch, generator=fixed).mul(0.6).exp()
        lengths = (lengths / lengths.max() * longest).clamp(min=shortest).int()
    else:
        lengths = torch.randint(shortest, longest + 1, (batch,), generator=fixed)
    most, total = int(lengths.max()), int(lengths.sum())
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(device)

    def leaf(*shape):
        return torch.randn(*shape, device=device).to(kind).requires_grad_()

    leaves = [leaf(total, heads, dim) for _ in range(3)]
    theirs = [leaf(batch, heads, most, dim) for _ in range(3)]
    their_grad = torch.randn_like(theirs[0])
    passes = {
        "ours": (
            lambda: attention_varlen(*leaves, cu, cu, max_seqlen_q=most, max_seqlen_k=most),
            leaves,
            torch.randn_like(leaves[0]),
        )
    }
    for name, f in rivals(device).items():
        passes[f"{name}, padded"] = (lambda f=f: f(*theirs, is_causal=True), theirs, their_grad)
    yield from both_passes(
        f"B{batch} H{heads} D{dim} lengths {shortest}..{longest}",
        dtype,
        passes,
        2.0 * heads * dim * float(lengths.double().square().sum()),  # as dense, per sequence
        4 * total * heads * dim * leaves[0].element_size(),
    )


def decode(shape, dtype, device, size=16):
    """One token for each of `batch` sequences. The rival has its keys side by side already."""
    batch, held, heads, kv_heads, dim = shape
    kind = DTYPES[dtype]
    blocks = -(-(held + 1) // size)
    caches = [
        torch.randn(batch * blocks, size, kv_heads, dim, device=device).to(kind) for _ in range(2)
    ]
    table = torch.randperm(batch * blocks, device=device).reshape(batch, blocks).int()
    seqlens = torch.full((batch,), held, dtype=torch.int32, device=device)
    cu = torch.arange(batch + 1, dtype=torch.int32, device=device)
    q = torch.randn(batch, heads, dim, device=device).to(kind)
    new = torch.randn(2, batch, kv_heads, dim, device=device).to(kind)
    keys = torch.randn(2, batch, kv_heads, held + 1, dim, device=device).to(kind)

    def ours():
        return attention_paged_(q, *caches, table, seqlens, cu, k_new=new[0], v_new=new[1])

    def theirs(f):
        with torch.no_grad():
            return f(q[:, :, None], keys[0], keys[1], enable_gqa=True)

    variants = {"ours": ours}
    for name, f in rivals(device).items():
        variants[f"{name}, dense"] = lambda f=f: theirs(f)
    if device == "cpu":  # what memory gives: a sum of the same bytes
        words = [x.view(torch.float32) for x in caches]
        variants["floor: reading the caches"] = lambda: [x.sum() for x in words]
    yield Case(
        f"decode B{batch} H{heads}/{kv_heads} S{held} D{dim}",
        dtype,
        "fwd",
        variants,
        bytes=2.0 * batch * held * kv_heads * dim * q.element_size(),  # the caches, read once
        flops=4.0 * batch * heads * held * dim,
    )


def cases(device: str) -> Iterator[Case]:
    for dtype in DTYPES if device == "cpu" else ("bfloat16",):
        for make, shapes in ((dense, DENSE), (packed, PACKED), (decode, DECODE)):
            for shape in shapes[device]:
                yield from make(shape, dtype, device)
