"""sample: one token per row of logits, with every control of a row its own."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._common import (
    _C,
    check_device,
    check_dtype,
    check_float,
    check_shape,
    last_contiguous,
    register,
)


class Sampled(NamedTuple):
    """What `sample` drew; see its docstring."""

    tokens: Tensor
    logprobs: Tensor
    sampled_logprobs: Tensor


class Penalties(NamedTuple):
    """What makes tokens that occurred less likely (or more, with the opposite sign).

    generated: int32 (N, V), how often each token occurs in the response so far; None: nothing yet.
    prompt: bool (N, V), which tokens occur in the prompt; None: none does.
    repetition: r > 0, 1 is off. A logit x of a token in the prompt or the response becomes x / r if
        x > 0, else x r. Keskar et al. 2019, arXiv:1909.05858; as in transformers.
    presence, frequency: 0 is off. The logit of a token that occurs c > 0 times in the response
        falls by presence + c frequency, after `repetition`. As in OpenAI's API.
    """

    generated: Tensor | None = None
    prompt: Tensor | None = None
    repetition: float | Tensor = 1.0
    presence: float | Tensor = 0.0
    frequency: float | Tensor = 0.0


def philox_reference(counter: Tensor, key: Tensor) -> Tensor:
    """Philox 4x32-10 on 32-bit words in int64: counter (..., 4) and key (..., 2) give (..., 4)."""
    word = 0xFFFFFFFF
    c, k = list(counter.unbind(-1)), list(key.unbind(-1))
    for _ in range(10):
        # int64 products wrap, and keep the 64 bits of the unsigned ones.
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32 & word) ^ c[1] ^ k[0], p1 & word, (p0 >> 32 & word) ^ c[3] ^ k[1], p0 & word]
        k = [k[0] + 0x9E3779B9 & word, k[1] + 0xBB67AE85 & word]
    return torch.stack(torch.broadcast_tensors(*c), -1)


def gumbel_reference(seeds: Tensor, positions: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """(N, vocab) Gumbel noise of seeds and positions (N,), float32 or float64."""
    # Tokens t, t + 16, t + 32 and t + 48 of each 64 share a counter and take a word of it each.
    blocks = -(-vocab // 64)
    index = torch.arange(16 * blocks, device=seeds.device)[None, :]
    seeds, positions = seeds[:, None], positions[:, None]
    low, high = (lambda x: x & 0xFFFFFFFF), (lambda x: x >> 32 & 0xFFFFFFFF)
    counter = torch.broadcast_tensors(index, low(positions), high(positions), 0 * index)
    words = philox_reference(torch.stack(counter, -1), torch.stack((low(seeds), high(seeds)), -1))
    words = words.view(-1, blocks, 16, 4).transpose(-1, -2).flatten(1)[:, :vocab]
    # 31 bits, finest near 0, where the exponential's smallest values and so the winners come from.
    uniform = ((words & 0x7FFFFFFF).to(dtype) + 0.5) * 2.0**-31
    exponential = -torch.log1p(-uniform.clamp(max=1 - 2.0**-24))
    return -exponential.log()


def sample_reference(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seeds: int | Tensor,
    positions: int | Tensor,
    bias: Tensor | None = None,
    penalties: Penalties | None = None,
    allowed: Tensor | None = None,
) -> Sampled:
    """The specification: in float64 for float64 logits, else in float32."""
    rows, vocab = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32

    def column(control, dtype=dtype):
        return torch.as_tensor(control, dtype=dtype, device=logits.device).expand(rows)[:, None]

    raw = logits.to(dtype)
    z = raw if bias is None else raw + bias.to(dtype)
    if penalties is not None:
        nothing = torch.zeros_like(raw)
        count = nothing if penalties.generated is None else penalties.generated.to(dtype)
        seen = count > 0
        if penalties.prompt is not None:
            seen = seen | penalties.prompt
        factor = column(penalties.repetition)
        z = torch.where(seen, torch.where(z > 0, z / factor, z * factor), z)
        present = (count > 0).to(dtype)
        z = z - present * column(penalties.presence) - count * column(penalties.frequency)
    if allowed is not None:
        z = z.masked_fill(~allowed, -math.inf)
    greedy = column(temperature) <= 0
    z = z / torch.where(greedy, 1.0, column(temperature))

    # All three truncations keep a prefix of the row in this order.
    ordered, order = z.sort(dim=-1, descending=True, stable=True)
    index = torch.arange(vocab, device=logits.device)
    k = column(top_k, torch.int64)
    keep = (k <= 0) | (index < k)
    probabilities = ordered.masked_fill(~keep, -math.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    p = column(top_p)
    keep &= (p >= 1) | (before < p) | (index == 0)
    m = column(min_p)
    keep &= (m <= 0) | (ordered >= ordered[:, :1] + m.log())
    z = torch.full_like(z, -math.inf).scatter(
        -1, order, ordered.masked_fill(~keep & ~greedy, -math.inf)
    )

    noise = gumbel_reference(
        column(seeds, torch.int64)[:, 0], column(positions, torch.int64)[:, 0], vocab, dtype
    )
    tokens = torch.where(greedy, z, z + noise).argmax(-1, keepdim=True)
    logprobs = raw.log_softmax(-1).gather(-1, tokens)
    drawn = z.log_softmax(-1).gather(-1, tokens)
    impossible = logprobs.isnan() | drawn.isnan() | (z.gather(-1, tokens) == -math.inf)
    sampled_logprobs = torch.where(greedy, logprobs, drawn)
    return Sampled(
        tokens.masked_fill(impossible, -1)[:, 0],
        logprobs.masked_fill(impossible, math.nan)[:, 0],
        sampled_logprobs.masked_fill(impossible, math.nan)[:, 0],
    )


def _allocate(
    logits: Tensor,
    bias: Tensor | None,
    generated: Tensor | None,
    prompt: Tensor | None,
    allowed: Tensor | None,
    temperature: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    repetition: Tensor | None,
    presence: Tensor | None,
    frequency: Tensor | None,
    top_k: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    floats: list[float],
    integers: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    check_float("sample", logits=logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"sample: logits must be (N, V), V > 0, got {tuple(logits.shape)}")
    rows, vocab = logits.shape
    check_dtype("sample", torch.float32, bias=bias)
    if bias is not None and bias.shape not in ((rows, vocab), (vocab,)):
        raise ValueError(
            f"sample: bias must be {(rows, vocab)} or {(vocab,)}, got {tuple(bias.shape)}"
        )
    check_dtype("sample", torch.int32, generated=generated)
    check_dtype("sample", torch.bool, prompt=prompt, allowed=allowed)
    check_shape("sample", (rows, vocab), generated=generated, prompt=prompt, allowed=allowed)
    reals = {
        "temperature": temperature,
        "top_p": top_p,
        "min_p": min_p,
        "repetition": repetition,
        "presence": presence,
        "frequency": frequency,
    }
    whole = {"top_k": top_k, "seeds": seeds, "positions": positions}
    check_dtype("sample", torch.float32, **reals)
    check_dtype("sample", torch.int64, **whole)
    for name, control in (reals | whole).items():
        if control is not None and control.shape not in ((rows,), ()):
            raise ValueError(
                f"sample: {name} must be a number or {(rows,)}, got {tuple(control.shape)}"
            )
    check_device(
        "sample",
        logits,
        bias=bias,
        generated=generated,
        prompt=prompt,
        allowed=allowed,
        **reals,
        **whole,
    )
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
    )


def _run(logits, bias, generated, prompt, allowed, *controls_and_defaults):
    outputs = _allocate(logits, bias, generated, prompt, allowed, *controls_and_defaults)
    *controls, floats, integers = controls_and_defaults
    rows, vocab = logits.shape
    if rows == 0:
        return outputs
    threads = torch.get_num_threads()
    # On the CPU a slot of the workspace for each piece of rows: values, weights, adjusted logits.
    slots = 0 if logits.is_cuda else 1 if threads == 1 else min(rows, 4 * threads)
    workspace = logits.new_empty(slots, 3, -(-vocab // 16) * 16, dtype=torch.float32)
    wide = (bias, generated, prompt, allowed)
    _C.sample(
        last_contiguous(logits),
        *(None if x is None else last_contiguous(x) for x in wide),
        controls,
        floats,
        integers,
        *outputs,
        workspace,
        threads,
    )
    return outputs


_sample = register(
    "sample",
    "(Tensor logits, Tensor? bias, Tensor? generated, Tensor? prompt, Tensor? allowed, "
    "Tensor? temperature, Tensor? top_p, Tensor? min_p, Tensor? repetition, Tensor? presence, "
    "Tensor? frequency, Tensor? top_k, Tensor? seeds, Tensor? positions, float[] floats, "
    "int[] integers) -> (Tensor, Tensor, Tensor)",
    _allocate,
    _run,
    devices=("cpu", "cuda"),
)


@torch.no_grad()
def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seeds: int | Tensor,
    positions: int | Tensor,
    bias: Tensor | None = None,
    penalties: Penalties | None = None,
    allowed: Tensor | None = None,
) -> Sampled:
    """Draws a token from each row of logits, the same one in any batch, for any number of threads.

    In this order::

        z = logits + bias; penalties (see Penalties); -inf where not allowed; divided by temperature
        top_k: the k tokens of greatest z remain
        top_p: of these, the likeliest, up to and with the one that brings their share to top_p
        min_p: of these, those with a probability of at least min_p times the greatest
        token = argmax over what remains of z + Gumbel noise(seed, position, token)

    Where equal tokens are at a cut, the lower indices remain.

    Args:
        logits: (N, V) float32, bfloat16 or float16; last stride 1, else a copy is made.
        temperature: 0 takes the lowest argmax of z, without noise or truncation.
        top_k: 0 or less, or V or more: off.
        top_p: 0..1; 1 is off, 0 keeps one token.
        min_p: 0..1; 0 is off.
        seeds: 64 bits; the stream of a sequence.
        positions: of the token drawn, in its sequence. Two draws with the same seed and position
            share their noise.
        bias: float32 (N, V) or (V,).
        penalties: for tokens that occur already.
        allowed: bool (N, V), False for tokens that must not be drawn.

    All numbers, those in `penalties` too, may be tensors (N,) or () on logits' device: float32; for
    top_k, seeds and positions int64.

    Returns:
        Sampled(tokens, logprobs, sampled_logprobs), (N,): int64; float32 log-probability under
        `logits` as they are, at temperature 1; float32 log-probability in the distribution that
        was drawn from (at temperature 0: `logprobs`). A row from which nothing can be drawn (NaN
        or +inf in it, or every token at -inf) gives -1, NaN and NaN.

    Raises:
        TypeError: an element type is not the documented one.
        ValueError: shapes, devices or a number's range.

    Numerics: float32. With no truncation, penalties, bias or allowed, `sampled_logprobs` is bitwise
    `token_logprobs(temperature=temperature).logprobs`. The noise has 31 random bits: a token of
    probability below about 1e-9 is drawn less often than that. The share of top_p is summed in
    another order than a sort would give, within 1e-6.

    Source: Gumbel-max: Maddison et al. 2014, arXiv:1411.0030. Noise: Philox 4x32-10, Salmon et al.
    2011, doi:10.1145/2063384.2063405. top_p: Holtzman et al. 2020, arXiv:1904.09751. min_p: Nguyen
    et al. 2024, arXiv:2407.01082.
    """
    if penalties is None:
        penalties = Penalties()
    numbers = (
        (temperature, "temperature", 0.0, 1e30),
        (top_p, "top_p", 0.0, 1.0),
        (min_p, "min_p", 0.0, 1.0),
        (penalties.repetition, "repetition", 1e-30, 1e30),
        (penalties.presence, "presence", -1e30, 1e30),
        (penalties.frequency, "frequency", -1e30, 1e30),
    )
    tensors, floats = [], []
    for value, name, low, high in numbers:
        is_tensor = isinstance(value, Tensor)
        tensors.append(value if is_tensor else None)
        floats.append(0.0 if is_tensor else float(value))
        if not is_tensor and not low <= value <= high:
            raise ValueError(f"sample: {name} must be in [{low}, {high}], got {value}")
    integers = []
    if isinstance(seeds, int):
        if not -(2**63) <= seeds < 2**64:
            raise ValueError(f"sample: seeds must have 64 bits, got {seeds}")
        if seeds >= 2**63:
            seeds -= 2**64  # the same bits
    for value in (top_k, seeds, positions):
        is_tensor = isinstance(value, Tensor)
        tensors.append(value if is_tensor else None)
        integers.append(0 if is_tensor else value)
    drawn = _sample(
        logits, bias, penalties.generated, penalties.prompt, allowed, *tensors, floats, integers
    )
    return Sampled(*drawn)
