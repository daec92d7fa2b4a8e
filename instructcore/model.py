"""The model: one decoder over packed tokens, in the GPT-2 and the Llama / Qwen shape.

Sequences lie end to end: tokens (N,) and cu_seqlens (B + 1,) int32, which says where each begins.
There is no padding: attention stays within a sequence and positions restart in each.

    x = embed(tokens)                       residual stream (N, C), float32
    for each layer:
        x += out(attention(qkv(norm(x))))   qkv is ONE matrix of (H + 2K) D rows
        x += down(act(up(norm(x))))         Llama: up holds gate and up
    hidden = norm(x)                        (N, C), compute dtype, for a (V, C) or a (1, C) head

Precision: parameters are float32 masters, cast to the compute dtype where a matrix product uses
them; the residual stream and the norms stay float32.
Rotary pairs are neighbours (2i, 2i + 1) in memory, as ops.rotary and the paged cache take them. On
disk they are (i, i + D/2), as in Hugging Face checkpoints, whose names and shapes are kept there.

Sources: Radford et al. 2019 (GPT-2); Touvron et al. 2023, arXiv:2302.13971 (Llama); Yang et al.
2025, arXiv:2505.09388 (Qwen3).
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .config import check, check_divides, check_options, option
from .errors import UserError
from .ops._common import _C, fresh_pages
from .ops.linear import multiply, pack, packed_size

_NO_STORE = (torch.empty(0), 0)
_making = threading.RLock()  # of casts, for threads that share a frozen model
FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. A 0 stands for what follows from the others, see `resolved`."""

    family: str = option("llama", "layer shape, as HF model_type", choices=FAMILIES)
    vocab_size: int = option(259, "tokens in the vocabulary", range="[1, inf)")
    context: int = option(256, "longest sequence", unit="tokens", paper="2048", range="[1, inf)")
    layers: int = option(6, "decoder layers", range="[1, inf)")
    heads: int = option(4, "query heads", range="[1, inf)")
    kv_heads: int = option(0, "key/value heads, 0 = as many as query heads", range="[0, inf)")
    width: int = option(256, "residual stream", unit="channels", range="[1, inf)")
    head_dim: int = option(
        0, "size of a head, 0 = width / heads", unit="channels", range="[0, 256]"
    )
    mlp_width: int = option(
        0,
        "hidden layer of the MLP, 0 = 4 width (gpt2) or 8/3 width",
        unit="channels",
        range="[0, inf)",
    )
    tie_head: bool = option(True, "the output matrix is the token embedding")
    rope_theta: float = option(10000.0, "base of the rotary frequencies", range="(0, inf)")
    norm_eps: float = option(1e-5, "added to the variance in norms", range="(0, inf)")
    dropout: float = option(
        0.0, "residual dropout while training", unit="probability", range="[0, 1)"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not self.head_dim or self.family == "gpt2":
            check_divides(self.heads, self.width, ("heads", "width"))
        kv_heads, head_dim = self.kv_heads or self.heads, self.head_dim or self.width // self.heads
        check_divides(kv_heads, self.heads, ("kv-heads", "heads"))
        check(
            head_dim % 8 == 0 and 8 <= head_dim <= 256,
            f"the width of a head must be a multiple of 8 up to 256, got {head_dim}",
        )
        check(
            self.family != "gpt2" or kv_heads * head_dim == self.width,
            "gpt2 has as many key/value as query heads, each of width / heads channels, "
            f"got --kv-heads {kv_heads}, --head-dim {head_dim}",
        )

    def resolved(self) -> ModelConfig:
        """This shape without zeros: what `GPT.config` holds."""
        # 8/3 width: three matrices with the parameters of GPT-2's two, in whole cache lines.
        gated = -(-self.width * 8 // 3 // 32) * 32
        return replace(
            self,
            kv_heads=self.kv_heads or self.heads,
            head_dim=self.head_dim or self.width // self.heads,
            mlp_width=self.mlp_width or (4 * self.width if self.family == "gpt2" else gated),
        )


class KVCache:
    """Paged keys and values of every layer, for `GPT.decode`.

    keys, values: per layer (blocks, block_size, K, D), compute dtype; block_table (B, max_blocks)
    int32, unused entries -1; seqlens (B,) int32, the tokens each row holds. Which row owns which
    block is the caller's policy.
    """

    def __init__(self, model: GPT, blocks: int, block_size: int, rows: int, max_blocks: int):
        config = model.config
        like = {"dtype": model.compute_dtype, "device": model.embed.device}
        shape = (blocks, block_size, config.kv_heads, config.head_dim)
        self.keys = [fresh_pages(torch.empty(shape, **like)) for _ in range(config.layers)]
        self.values = [fresh_pages(torch.empty(shape, **like)) for _ in range(config.layers)]
        indices = {"dtype": torch.int32, "device": model.embed.device}
        self.block_table = torch.full((rows, max_blocks), -1, **indices)
        self.seqlens = torch.zeros(rows, **indices)


class _Block(nn.Module):
    """The parameters of one layer; `GPT._layers` computes with them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, width, dim = config, config.width, config.head_dim
        is_gpt2 = c.family == "gpt2"
        qkv = (c.heads + 2 * c.kv_heads) * dim

        def parameter(*shape: int, when: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape)) if when else None

        self.norm1 = parameter(width)
        self.norm1_bias = parameter(width, when=is_gpt2)
        self.qkv = parameter(qkv, width)
        self.qkv_bias = parameter(qkv, when=c.family in ("gpt2", "qwen2"))
        self.q_norm = parameter(dim, when=c.family == "qwen3")
        self.k_norm = parameter(dim, when=c.family == "qwen3")
        self.out = parameter(width, c.heads * dim)
        self.out_bias = parameter(width, when=is_gpt2)
        self.norm2 = parameter(width)
        self.norm2_bias = parameter(width, when=is_gpt2)
        self.up = parameter(c.mlp_width * (1 if is_gpt2 else 2), width)
        self.up_bias = parameter(c.mlp_width, when=is_gpt2)
        self.down = parameter(width, c.mlp_width)
        self.down_bias = parameter(width, when=is_gpt2)


class GPT(nn.Module):
    """A decoder with a language-model head ("lm") or a score per token ("scalar": rewards, values).

    Args:
        config: the shape.
        head: "lm" gives logits (N, V), "scalar" gives scores (N,).
        dtype: compute dtype (float32, bfloat16, float16); parameters are float32 whatever it is.
        generator: source of the initial weights; None is one seeded with 0.
        initialise: False leaves the weights to the caller.

    Attributes:
        score_bias: () buffer added to every score, which centres rewards; None for "lm".
        token_ids: bos/eos/pad ids as they go into config.json, {} if unknown.
        extra: what `save` was told to keep under "instructcore" in config.json.
    """

    def __init__(
        self,
        config: ModelConfig,
        head: str = "lm",
        dtype: torch.dtype = torch.float32,
        *,
        generator: torch.Generator | None = None,
        initialise: bool = True,
    ):
        super().__init__()
        if head not in ("lm", "scalar"):
            raise ValueError(f'GPT: head must be "lm" or "scalar", got {head!r}')
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"GPT: dtype must be float32, bfloat16 or float16, got {dtype}")
        self.config = config = config.resolved()
        self.head, self.compute_dtype = head, dtype
        self.token_ids: dict[str, int | list[int] | None] = {}
        self.extra: dict = {}
        self._freezes, self._casts = 0, {}  # see `frozen`; what was made of the weights, by what
        self._store = _NO_STORE  # memory of packed weights, and how much of it is used
        width, vocab, is_gpt2 = config.width, config.vocab_size, config.family == "gpt2"
        untied = head == "lm" and not config.tie_head
        self.embed = nn.Parameter(torch.empty(vocab, width))
        self.positions = nn.Parameter(torch.empty(config.context, width)) if is_gpt2 else None
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.empty(width))
        self.norm_bias = nn.Parameter(torch.empty(width)) if is_gpt2 else None
        self.unembed = nn.Parameter(torch.empty(vocab, width)) if untied else None
        self.score = nn.Parameter(torch.empty(1, width)) if head == "scalar" else None
        self.register_buffer("score_bias", torch.zeros(()) if head == "scalar" else None)
        if not is_gpt2:
            # float32 in transformers' order of operations, so that all angles are equal to theirs.
            steps = torch.arange(0, config.head_dim, 2).float() / config.head_dim
            angles = torch.outer(torch.arange(config.context).float(), 1 / config.rope_theta**steps)
        self.register_buffer("cos", None if is_gpt2 else angles.cos(), persistent=False)
        self.register_buffer("sin", None if is_gpt2 else angles.sin(), persistent=False)
        if initialise:
            self._initialise(generator or torch.Generator().manual_seed(0))

    def _initialise(self, generator: torch.Generator) -> None:
        """GPT-2's: N(0, 0.02), biases 0, norms 1. The 2 layers matrices that write to the residual
        stream are divided by sqrt(2 layers), so that its variance does not grow with depth."""
        residual = 1 / math.sqrt(2 * self.config.layers)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                last = name.rsplit(".", 1)[-1]
                if last == "score":
                    _normal(parameter, 1 / math.sqrt(self.config.width + 1), generator)
                elif parameter.ndim == 2:
                    scale = residual if last in ("out", "down") else 1.0
                    _normal(parameter, 0.02 * scale, generator)
                else:
                    parameter.fill_(0.0 if last.endswith("bias") else 1.0)

    # -- computing --------------------------------------------------------------------------------

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Logits (N, V) or scores (N,), float32, of packed sequences: see `hidden`."""
        hidden = self.hidden(tokens, cu_seqlens)
        return self.logits(hidden) if self.head == "lm" else self.scores(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) float32 logits of hidden states, never rounded to the compute dtype."""
        parameter = self.embed if self.unembed is None else self.unembed
        if hidden.is_cuda:
            return F.linear(hidden.float(), self._cast(parameter, widen=True))
        fits = hidden.dtype == self.compute_dtype and hidden.shape[1:] == parameter.shape[1:]
        if fits and hidden.is_contiguous() and _kernels_suffice(hidden, parameter):
            shape = (hidden.shape[0], parameter.shape[0])
            logits = torch.empty(shape, dtype=torch.float32, device="cpu")
            multiply(hidden, self._packed(parameter), None, logits)
            return logits
        return ops.linear(hidden, self._cast(parameter), out_dtype=torch.float32)

    def scores(self, hidden: Tensor) -> Tensor:
        """(...,) float32 scores of hidden states; the product is taken in float32."""
        return (hidden.float() @ self.score[0]) + self.score_bias

    @property
    def head_weight(self) -> Tensor:
        """(V, C) output matrix in the compute dtype, tied or not: what the fused losses take."""
        if self.head != "lm":
            raise ValueError("GPT: a model with a scalar head has no head_weight")
        return self._cast(self.embed if self.unembed is None else self.unembed)

    def hidden(
        self, tokens: Tensor, cu_seqlens: Tensor, *, max_seqlen: int | None = None
    ) -> Tensor:
        """Hidden states of packed sequences, ready for the head.

        Args:
            tokens: (N,) int64 token ids.
            cu_seqlens: (B + 1,) int32: sequence b is tokens cu_seqlens[b] .. cu_seqlens[b + 1] - 1.
            max_seqlen: the longest sequence, if known; spares a look at cu_seqlens.

        Returns:
            (N, C) in the compute dtype, after the final norm.

        Raises:
            UserError: a sequence is longer than the context.
        """
        config = self.config
        if max_seqlen is None and not cu_seqlens.is_cuda:
            max_seqlen = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
        if max_seqlen is not None and max_seqlen > config.context:
            raise UserError(f"a sequence of {max_seqlen} tokens, context is {config.context}")
        positions = _positions(cu_seqlens, tokens.shape[0])

        def attend(layer: int, qkv: Tensor) -> Tensor:
            heads = {"heads": config.heads, "kv_heads": config.kv_heads}
            if self.positions is None:
                q, k, v = ops.rotary(qkv, self.cos, self.sin, positions, **heads)
            else:
                q, k, v = qkv.split((config.heads, config.kv_heads, config.kv_heads), 1)
            longest = {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
            return ops.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True, **longest)

        dropout = self.config.dropout if self.training else 0.0
        return self._layers(tokens, positions, attend, dropout)

    @torch.no_grad()
    def decode(self, tokens: Tensor, cu_seqlens: Tensor, cache: KVCache) -> Tensor:
        """Hidden states (N, C) of the next tokens of each row, whose past is in the cache.

        Row b continues with tokens cu_seqlens[b] .. cu_seqlens[b + 1] - 1, one for a decode step,
        more for a chunk of a prompt; on the CPU every token belongs to a row. Their keys and values
        are appended to the cache, and its seqlens advance, in place. The caller has given each row
        the blocks it needs and keeps it within the context.
        """
        tensors = (tokens, cu_seqlens, self.embed, cache.keys[0], cache.seqlens, cache.block_table)
        whole = _kernels_suffice(*tensors)
        return (self._decode_in_one_call if whole else self._decode)(tokens, cu_seqlens, cache)

    def _decode(self, tokens: Tensor, cu_seqlens: Tensor, cache: KVCache) -> Tensor:
        config, before = self.config, cache.seqlens
        positions = None
        if self.positions is not None:
            positions = _positions(cu_seqlens, tokens.shape[0], before)
        rotary = {}
        if positions is None:
            rotary = {"cos": self.cos, "sin": self.sin, "interleaved": True}

        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, k, v = qkv.split((config.heads, config.kv_heads, config.kv_heads), 1)
            held = cache.keys[layer], cache.values[layer], cache.block_table, before
            return ops.attention_paged_(q, *held, cu_seqlens, k_new=k, v_new=v, **rotary)

        hidden = self._layers(tokens, positions, attend, 0.0)
        before += cu_seqlens.diff()
        return hidden

    def _decode_in_one_call(self, tokens: Tensor, cu_seqlens: Tensor, cache: KVCache) -> Tensor:
        """The same on the CPU without a call from Python per kernel: csrc/trunk.h. Same bits."""
        config = self.config
        hidden = torch.empty(tokens.shape[0], config.width, dtype=self.compute_dtype, device="cpu")
        layers = self._while_frozen("layers", lambda: [*map(self._weights_of, self.blocks)])
        fed = tokens.long().contiguous(), cu_seqlens.contiguous()
        held = cache.keys, cache.values, cache.block_table.contiguous(), cache.seqlens
        shape = config.heads, config.mlp_width, config.family != "gpt2", config.norm_eps
        _C.trunk(
            *(*fed, self.embed, self.positions, layers, self.norm, self.norm_bias),
            *(*held, self.cos, self.sin, hidden, *shape, torch.get_num_threads()),
        )
        return hidden

    def _weights_of(self, block: _Block) -> tuple[Tensor | None, ...]:
        """A layer's parameters, matrices and their biases in the compute dtype."""
        b, cast, packed = block, self._cast, self._packed
        return (
            *(b.norm1, b.norm1_bias, packed(b.qkv), cast(b.qkv_bias), b.q_norm, b.k_norm),
            *(packed(b.out), cast(b.out_bias), b.norm2, b.norm2_bias),
            *(packed(b.up), cast(b.up_bias), packed(b.down), cast(b.down_bias)),
        )

    @contextmanager
    def frozen(self) -> Iterator[GPT]:
        """No weight changes within it, so without gradient each is cast once, not per call."""
        self._freezes += 1
        try:
            yield self
        finally:  # of several that overlap, whichever ends last
            self._freezes -= 1
            if not self._freezes:
                self._casts.clear()
                self._store = _NO_STORE

    def _cast(self, parameter: Tensor | None, widen: bool = False) -> Tensor | None:
        """The parameter in the compute dtype; `widen`: those values in float32."""
        if parameter is None or self.compute_dtype == torch.float32:
            return parameter

        def cast() -> Tensor:
            rounded = parameter.to(self.compute_dtype)
            return rounded.float() if widen else rounded

        if torch.is_grad_enabled() and parameter.requires_grad:
            return cast()
        return self._while_frozen((id(parameter), widen), cast)

    def _packed(self, parameter: Tensor) -> Tensor:
        """A matrix as `linear.multiply` reads it best: bfloat16 ones are packed while frozen."""
        if not self._freezes or self.compute_dtype != torch.bfloat16 or not parameter.is_cpu:
            return self._cast(parameter)
        return self._while_frozen((id(parameter), "packed"), lambda: self._pack(parameter))

    def _pack(self, parameter: Tensor) -> Tensor:
        """All packed matrices lie end to end in huge pages."""
        size, (store, used) = packed_size(parameter), self._store
        if used + size > store.numel():
            floats = max(size, 16 << 20)
            store, used = fresh_pages(torch.empty(floats, dtype=torch.float32, device="cpu")), 0
        self._store = store, used + size
        return pack(parameter.to(torch.bfloat16), store[used : used + size])

    def _while_frozen(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, the first time only within `frozen`."""
        if not self._freezes:
            return make()
        with _making:
            if key not in self._casts:
                with torch.inference_mode(False), torch.no_grad():
                    self._casts[key] = make()
            return self._casts[key]

    def _add_norm(self, x, branch, weight, bias, dropout) -> tuple[Tensor, Tensor]:
        """(x + branch, its norm in the compute dtype); without a branch yet, x itself."""
        if branch is not None and dropout:
            branch = F.dropout(branch, dropout)
        settings = {"eps": self.config.norm_eps, "dtype": self.compute_dtype}
        return ops.add_norm(x, branch, weight, bias, **settings)

    def _head_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return ops.add_norm(rows, None, weight, eps=self.config.norm_eps)[1].view(x.shape)

    def _layers(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        attend: Callable[[int, Tensor], Tensor],
        dropout: float,
    ) -> Tensor:
        """The trunk. `attend(layer, qkv (N, H + 2K, D))` gives (N, H, D); it knows the past."""
        config, cast = self.config, self._cast
        x = F.embedding(tokens, self.embed)
        if self.positions is not None:
            x = x + F.embedding(positions, self.positions)
        if dropout:
            x = F.dropout(x, dropout)
        rows, groups = tokens.shape[0], (config.heads, config.kv_heads, config.kv_heads)
        branch = None
        for layer, block in enumerate(self.blocks):
            x, y = self._add_norm(x, branch, block.norm1, block.norm1_bias, dropout)
            qkv = ops.linear(y, cast(block.qkv), cast(block.qkv_bias))
            qkv = qkv.view(rows, sum(groups), config.head_dim)
            if block.q_norm is not None:
                q, k, v = qkv.split(groups, 1)
                q, k = self._head_norm(q, block.q_norm), self._head_norm(k, block.k_norm)
                qkv = torch.cat((q, k, v), 1)
            y = attend(layer, qkv).reshape(rows, config.heads * config.head_dim)
            branch = ops.linear(y, cast(block.out), cast(block.out_bias))
            x, y = self._add_norm(x, branch, block.norm2, block.norm2_bias, dropout)
            y = ops.linear(y, cast(block.up), cast(block.up_bias))
            y = ops.swiglu(y) if config.family != "gpt2" else ops.gelu(y)
            branch = ops.linear(y, cast(block.down), cast(block.down_bias))
        return self._add_norm(x, branch, self.norm, self.norm_bias, dropout)[1]

    # -- making one from another ------------------------------------------------------------------

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def resize_vocab(self, vocab_size: int, generator: torch.Generator | None = None) -> None:
        """Grows the vocabulary to at least `vocab_size`; the parameters concerned are replaced.

        New rows are the mean of the old ones, so that they start as unlikely as an average token,
        plus N(0, 0.002), which sets them apart.
        """
        new = vocab_size - self.config.vocab_size
        if new <= 0:
            return
        generator = generator or torch.Generator().manual_seed(0)
        for name in ("embed", "unembed"):
            old = getattr(self, name)
            if old is not None:
                grown = torch.cat((old, old.new_empty(new, old.shape[1])))
                _normal(grown[-new:], 0.002, generator)
                grown[-new:] += old.mean(0)
                setattr(self, name, nn.Parameter(grown, old.requires_grad))
        self.config = replace(self.config, vocab_size=vocab_size)

    def to_scalar_head(self, generator: torch.Generator | None = None) -> GPT:
        """A copy of the trunk under a new head, N(0, 1 / sqrt(width + 1)): Stiennon et al. 2020."""
        generator = generator or torch.Generator().manual_seed(0)
        model = GPT(self.config, "scalar", self.compute_dtype, initialise=False)
        trunk = {k: v for k, v in self.state_dict().items() if k not in ("unembed", "score")}
        model.load_state_dict(trunk, strict=False)
        with torch.no_grad():
            _normal(model.score, 1 / math.sqrt(self.config.width + 1), generator)
        model.token_ids = dict(self.token_ids)
        return model.to(self.embed.device)

    # -- checkpoints ------------------------------------------------------------------------------

    def save(self, directory: str | Path, tokenizer=None, extra: dict | None = None) -> None:
        """Writes a Hugging Face checkpoint: config.json, generation_config.json, model.safetensors.

        Args:
            directory: made if missing; files of those names are replaced.
            tokenizer: written too, and its eos and pad ids become the checkpoint's.
            extra: JSON for this package's own use, kept under "instructcore" in config.json.
        """
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save(directory)
            self.token_ids["eos_token_id"] = tokenizer.eos_id
            self.token_ids["pad_token_id"] = tokenizer.pad_id
        ids = {name: self.token_ids.get(name) for name in _TOKEN_IDS}
        ours = {"dropout": self.config.dropout, **self.extra, **(extra or {})}
        if self.head == "scalar":
            ours["score_bias"] = float(self.score_bias)
        config = _hf_config(self.config, self.head) | ids | {"instructcore": ours}
        _write_json(directory / "config.json", config)
        if self.head == "lm":
            _write_json(directory / "generation_config.json", {"do_sample": True, **ids})
        tensors = {
            piece.name: piece.to_disk(value.detach()).contiguous().cpu()
            for piece, value in _pieces(self)
        }
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def load(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> GPT:
    """The model of a Hugging Face checkpoint directory: a language or a reward model.

    Args:
        path: the directory.
        dtype: compute dtype; None is float32. Weights of any floating dtype are read.
        device: where to put it; None is the CPU.

    Raises:
        UserError: no checkpoint there, one of another kind, or a tensor missing, unknown or
            misshapen.
    """
    directory = Path(path)
    final = directory / "final"
    check(
        (directory / "config.json").is_file() and any(directory.glob("*.safetensors*")),
        f"{path}: no checkpoint there, which takes config.json and model.safetensors"
        + (f"; it is a run, whose model is {final}" if final.is_dir() else ""),
    )
    hf = _read_json(directory / "config.json")
    config, head = _from_hf_config(hf, directory / "config.json")
    model = GPT(config, head, dtype or torch.float32, initialise=False)
    _read_weights(model, directory)
    model.extra = {k: v for k, v in hf.get("instructcore", {}).items() if k != "dropout"}
    if head == "scalar":
        model.score_bias.fill_(model.extra.pop("score_bias", 0.0))
    model.token_ids = {name: hf.get(name) for name in _TOKEN_IDS}
    return model.to(device or "cpu")


_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Names in config.json: GPT-2's, Llama's and Qwen's.
_HF_KEYS = {
    "vocab_size": ("vocab_size", "vocab_size"),
    "context": ("n_positions", "max_position_embeddings"),
    "layers": ("n_layer", "num_hidden_layers"),
    "heads": ("n_head", "num_attention_heads"),
    "kv_heads": ("", "num_key_value_heads"),
    "width": ("n_embd", "hidden_size"),
    "head_dim": ("", "head_dim"),
    "mlp_width": ("n_inner", "intermediate_size"),
    "tie_head": ("tie_word_embeddings", "tie_word_embeddings"),
    "rope_theta": ("", "rope_theta"),
    "norm_eps": ("layer_norm_epsilon", "rms_norm_eps"),
}
# Names of tensors, the same way; several where one of our matrices holds several of theirs.
_HF_TENSORS = {
    "embed": ("transformer.wte", "model.embed_tokens"),
    "positions": ("transformer.wpe", ""),
    "norm": ("transformer.ln_f", "model.norm"),
    "unembed": ("lm_head", "lm_head"),
    "score": ("score", "score"),
    "norm1": ("ln_1", "input_layernorm"),
    "qkv": ("attn.c_attn", "self_attn.q_proj self_attn.k_proj self_attn.v_proj"),
    "q_norm": ("", "self_attn.q_norm"),
    "k_norm": ("", "self_attn.k_norm"),
    "out": ("attn.c_proj", "self_attn.o_proj"),
    "norm2": ("ln_2", "post_attention_layernorm"),
    "up": ("mlp.c_fc", "mlp.gate_proj mlp.up_proj"),
    "down": ("mlp.c_proj", "mlp.down_proj"),
}
# Derived tensors that older versions of transformers wrote beside the weights.
_IGNORED = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
# What transformers leaves out of config.json because it is the family's default.
_HF_DEFAULTS = {
    "gpt2": {"context": 1024, "norm_eps": 1e-5, "tie_head": True},
    "llama": {"context": 2048, "norm_eps": 1e-6, "tie_head": False},
    "qwen2": {"context": 32768, "norm_eps": 1e-6, "tie_head": False},
    "qwen3": {"context": 32768, "norm_eps": 1e-6, "tie_head": False, "head_dim": 128},
}
# Settings that change what is computed, with the values that this model computes.
_HF_FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "hidden_act": ("silu",),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
}


def _hf_config(config: ModelConfig, head: str) -> dict:
    """config.json of this shape."""
    is_gpt2 = config.family == "gpt2"
    stem = "GPT2" if is_gpt2 else config.family.title()
    kind = "LMHeadModel" if is_gpt2 else "ForCausalLM"
    out = {
        "architectures": [stem + (kind if head == "lm" else "ForSequenceClassification")],
        "model_type": config.family,
        "torch_dtype": "float32",
    }
    for ours, names in _HF_KEYS.items():
        if names[not is_gpt2]:
            out[names[not is_gpt2]] = getattr(config, ours)
    if is_gpt2:
        out |= {"activation_function": "gelu_new", "attn_pdrop": 0.0}
        out |= {"resid_pdrop": config.dropout, "embd_pdrop": config.dropout}
    else:
        out["hidden_act"] = "silu"
        out["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if head == "scalar":
        out |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    return out


def _from_hf_config(hf: dict, file: Path) -> tuple[ModelConfig, str]:
    """(shape, head) of a config.json, or a UserError about what in it is not computed here."""
    family, own = hf.get("model_type"), hf.get("instructcore", {})
    scalar = str(hf.get("architectures")).endswith("ForSequenceClassification']")
    kinds = ", ".join(FAMILIES)
    try:
        check(family in FAMILIES, f"model_type must be one of {kinds}, got {family!r}")
        _typed("instructcore", own, dict)
        for name in ("rope_parameters", "rope_scaling", "id2label"):
            _typed(name, hf.get(name) or {}, dict)
        for name in _TOKEN_IDS:
            ids = hf.get(name)
            for id in ids if isinstance(ids, list) else [] if ids is None else [ids]:
                _typed(name, id, int)
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        scaling = rope.get("rope_type", rope.get("type", "default"))
        for name, allowed in _HF_FIXED.items():
            value = {**hf, **rope}.get(name)
            check(value is None or value in allowed, f"{name} = {value!r} is not supported")
        check(scaling == "default", f"rotary scaling {scaling!r} is not supported")
        check(
            not scalar or len(hf.get("id2label") or "01") == 1,
            "a reward model must have exactly one label",
        )
        for name in ("dropout", "score_bias"):
            _typed(f"instructcore.{name}", own.get(name, 0.0), float)
        shape = {"dropout": own.get("dropout", 0.0)}
        for ours, names in _HF_KEYS.items():
            name = names[family != "gpt2"]
            value = (rope if name in rope else hf).get(name)
            if value is not None:
                shape[ours] = _typed(name, value, type(getattr(ModelConfig, ours)))
            check(
                value is not None or ours not in ("vocab_size", "layers", "heads", "width"),
                f"{name} is missing",
            )
        return ModelConfig(family, **_HF_DEFAULTS[family] | shape), "scalar" if scalar else "lm"
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _typed(name: str, value: Any, kind: type) -> Any:
    """The value of a key, if of this kind: an integer is a number, too, but true is neither."""
    good = type(value) in ((int, float) if kind is float else (kind,))
    check(good, f"{name} must be of type {kind.__name__}, got {json.dumps(value):.60}")
    return value


class _Piece(NamedTuple):
    """A tensor on disk, beside the rows of a parameter that hold it in memory."""

    name: str
    head_dim: int = 0  # of rows that are rotary channels, else 0
    transposed: bool = False  # GPT-2's Conv1D

    def to_disk(self, value: Tensor) -> Tensor:
        """Pairs (2i, 2i + 1) of each head's rows become (i, i + D/2)."""
        if self.head_dim:
            pairs = value.unflatten(0, (-1, self.head_dim // 2, 2))
            return pairs.transpose(1, 2).reshape(value.shape)
        return value.t() if self.transposed else value

    def from_disk(self, value: Tensor) -> Tensor:
        if self.head_dim:
            halves = value.unflatten(0, (-1, 2, self.head_dim // 2))
            return halves.transpose(1, 2).reshape(value.shape)
        return value.t() if self.transposed else value


def _pieces(model: GPT) -> Iterator[tuple[_Piece, Tensor]]:
    """Every tensor on disk and the part of a parameter that it is."""
    config = model.config
    is_gpt2, dim = config.family == "gpt2", config.head_dim
    for ours, parameter in model.named_parameters():
        *path, last = ours.split(".")
        stem, kind = last.removesuffix("_bias"), "bias" if last.endswith("_bias") else "weight"
        names = _HF_TENSORS[stem][not is_gpt2].split()
        prefix = f"{'transformer.h' if is_gpt2 else 'model.layers'}.{path[1]}." if path else ""
        sizes = [parameter.shape[0] // len(names)] * len(names)
        if stem == "qkv" and not is_gpt2:
            sizes = [config.heads * dim, config.kv_heads * dim, config.kv_heads * dim]
        for name, rows in zip(names, parameter.split(sizes), strict=True):
            rotary = dim if name.endswith(("q_proj", "k_proj", "q_norm", "k_norm")) else 0
            transposed = is_gpt2 and bool(path) and parameter.ndim == 2
            yield _Piece(f"{prefix}{name}.{kind}", rotary, transposed), rows


@torch.no_grad()
def _read_weights(model: GPT, directory: Path) -> None:
    """Fills the parameters from the directory's safetensors, one tensor in memory at a time."""
    from safetensors import SafetensorError, safe_open

    files = [directory / "model.safetensors"]
    if not files[0].is_file():
        index = directory / "model.safetensors.index.json"
        weight_map = _read_json(index).get("weight_map", {})
        good = isinstance(weight_map, dict) and all(type(f) is str for f in weight_map.values())
        check(good, f"{index}: weight_map must map names of tensors to files")
        files = [directory / name for name in sorted(set(weight_map.values()))]
    root = "transformer." if model.config.family == "gpt2" else "model."
    wanted = {piece.name: (piece, rows) for piece, rows in _pieces(model)}
    missing = dict.fromkeys(wanted)
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    # A tied head may be written too; a bare trunk's names lack the root.
                    ours = name if name in wanted else root + name
                    if ours not in wanted:
                        derived = name.endswith(_IGNORED) or name == "lm_head.weight"
                        check(derived, f"{file}: unknown tensor {name} for this config.json")
                        continue
                    (piece, rows), value = wanted[ours], tensors.get_tensor(name)
                    shape = rows.t().shape if piece.transposed else rows.shape
                    check(
                        value.shape == shape and value.is_floating_point(),
                        f"{file}: {name} must be floating point of shape {list(shape)}, "
                        f"got {value.dtype} {list(value.shape)}",
                    )
                    rows.copy_(piece.from_disk(value))
                    missing.pop(ours, None)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: not a readable safetensors file: {error}") from error
    check(not missing, f"{directory}: tensor {next(iter(missing), '')} is missing")


def _kernels_suffice(*tensors: Tensor) -> bool:
    """Whether the kernels may be called as they are, without what torch does around an op."""
    around = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    return all(x.is_cpu for x in tensors) and not around and not torch.compiler.is_compiling()


def _positions(cu_seqlens: Tensor, n: int, before: Tensor | None = None) -> Tensor:
    """(N,) position of each packed token in its sequence, `before` (B,) being what came earlier.
    Rows past cu_seqlens[-1] (fixed-size buffers) go on counting from 0. No host sync."""
    index = torch.arange(n, dtype=torch.int32, device=cu_seqlens.device)
    row = torch.searchsorted(cu_seqlens[1:], index, right=True)
    offset = cu_seqlens if before is None else cu_seqlens - F.pad(before, (0, 1))
    return index - offset[row]


def _normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fills from a CPU stream, so that weights do not depend on the device."""
    tensor.copy_(torch.randn(tensor.shape, generator=generator, device="cpu").mul_(std))


def _read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable JSON file: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: must hold a JSON object")
    return value


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
