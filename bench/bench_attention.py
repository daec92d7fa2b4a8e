"""attention against torch's scaled_dot_product_attention: dense, packed against padded, decode."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench import Case
from torch.nn.functional import scaled_dot_product_attention as sdpa

from instructcore.ops import attention, attention_paged_, attention_varlen

DENSE = (
    (1, 8, 8, 2048, 64),
    (1, 8, 8, 2048, 128),
    (1, 8, 2, 2048, 64),
    (4, 8, 8, 256, 64),
    (16, 4, 4, 64, 32),
)
# sequences, shortest, longest: the pipeline's batches of 20 to 128 tokens, and a long tail
PACKED = ((12, 20, 128), (64, 20, 128), (200, 20, 64), (16, 20, 1500))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def trains(f, leaves, grad):
    """f() and the gradients of its leaves."""
    return lambda: torch.autograd.grad(f(), leaves, grad)


def both_passes(name, dtype, ours, theirs, rival, flops, bytes_forward):
    """Cases for the forward alone and with the backward; ours and theirs are (f, leaves, grad)."""

    def alone(f):
        def run():
            with torch.no_grad():
                return f()

        return run

    # Backward: two products of the forward again as five, so 2.5 times its FLOPs; it reads q, k, v,
    # out, dout and writes three gradients: twice the forward's four tensors.
    variants = {"ours": alone(ours[0]), rival: alone(theirs[0])}
    yield Case(name, dtype, "fwd", variants, bytes=bytes_forward, flops=flops)
    variants = {"ours": trains(*ours), rival: trains(*theirs)}
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
    yield from both_passes(
        f"B{batch} H{heads}/{kv_heads} T{tokens} D{dim}",
        dtype,
        (lambda: attention(*leaves), leaves, grad),
        (lambda: sdpa(*theirs, **options), theirs, heads_first(grad).detach()),
        "SDPA, contiguous",
        flops,
        size,
    )


def packed(batch, shortest, longest, dtype, device, heads=4, dim=32):
    kind = DTYPES[dtype]
    if longest > 1000:  # lognormal: about half of the padded batch is padding
        lengths = torch.randn(batch).mul(0.7).exp()
        lengths = (lengths / lengths.max() * longest).clamp(min=shortest).int()
    else:
        lengths = torch.randint(shortest, longest + 1, (batch,))
    most, total = int(lengths.max()), int(lengths.sum())
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(device)

    def leaf(*shape):
        return torch.randn(*shape, device=device).to(kind).requires_grad_()

    leaves = [leaf(total, heads, dim) for _ in range(3)]
    theirs = [leaf(batch, heads, most, dim) for _ in range(3)]
    yield from both_passes(
        f"B{batch} H{heads} D{dim} lengths {shortest}..{longest}",
        dtype,
        (
            lambda: attention_varlen(*leaves, cu, cu, max_seqlen_q=most, max_seqlen_k=most),
            leaves,
            torch.randn_like(leaves[0]),
        ),
        (lambda: sdpa(*theirs, is_causal=True), theirs, torch.randn_like(theirs[0])),
        "SDPA, padded",
        2.0 * heads * dim * float(lengths.double().square().sum()),  # as dense, per sequence
        4 * total * heads * dim * leaves[0].element_size(),
    )


def decode(batch, held, dtype, device, heads=8, kv_heads=2, dim=64, size=16):
    """One token for each of `batch` sequences. The rival has its keys side by side already."""
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

    def theirs():
        with torch.no_grad():
            return sdpa(q[:, :, None], keys[0], keys[1], enable_gqa=True)

    yield Case(
        f"decode B{batch} H{heads}/{kv_heads} S{held} D{dim}",
        dtype,
        "fwd",
        {"ours": ours, "SDPA, dense": theirs},
        bytes=2.0 * batch * held * kv_heads * dim * q.element_size(),  # the caches, read once
        flops=4.0 * batch * heads * held * dim,
    )


def cases(device: str) -> Iterator[Case]:
    for dtype in DTYPES:
        for shape in DENSE:
            yield from dense(shape, dtype, device)
        for batch, shortest, longest in PACKED:
            yield from packed(batch, shortest, longest, dtype, device)
        for batch, held in ((1, 4096), (16, 1024), (64, 128)):
            yield from decode(batch, held, dtype, device)
