"""The episodes of a PPO iteration: prompts and responses end to end, and what is known of them."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .data import pack
from .errors import UserError
from .evaluate import Sample
from .pretrain import to_device


@dataclass
class Episodes:
    """Prompts and responses end to end, with what PPO knows of each position.

    Tensors are (N,). `mask` is True at the positions that predict a token of a response: there
    `targets` is that token, and everything else belongs to it. Elsewhere nothing counts; but where
    the score comes after the end, `states` has the positions after it too, whose value is learnt.
    `old_logprobs` begin as the generator's, `weights` correct for it where it is not the trainer.
    """

    starts: list[int]  # B + 1 offsets, on the host
    tokens: Tensor
    targets: Tensor
    mask: Tensor
    states: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample], device: torch.device) -> Episodes:
        lengths = [(len(s.prompt_ids), len(s.completion.token_ids)) for s in samples]
        masks = [[False] * prompt + [True] * response for prompt, response in lengths]
        packed = pack([(s.sequence, mask) for s, mask in zip(samples, masks, strict=True)])
        starts, packed = packed.cu_seqlens.tolist(), to_device(packed, device)
        blank = [torch.zeros(starts[-1], device=device) for _ in range(5)]
        mask, ones = packed.targets >= 0, torch.ones(starts[-1], device=device)
        episodes = cls(starts, packed.tokens, packed.targets, mask, mask.clone(), *blank, ones)
        drawn = [x for s in samples for x in s.completion.sampled_logprobs]
        episodes.old_logprobs[episodes.mask] = torch.tensor(drawn, device=device)
        return episodes

    def index(self, rows: Sequence[int]) -> Tensor:
        """Where the positions of these episodes are."""
        spans = [torch.arange(self.starts[row], self.starts[row + 1]) for row in rows]
        return torch.cat(spans).to(self.tokens.device)

    def take(self, rows: Sequence[int]) -> Episodes:
        """These episodes alone, in this order."""
        lengths = (self.starts[row + 1] - self.starts[row] for row in rows)
        starts, index = list(itertools.accumulate(lengths, initial=0)), self.index(rows)
        names = [f.name for f in fields(self) if f.name != "starts"]
        return Episodes(starts, **{name: getattr(self, name)[index] for name in names})

    def put(self, rows: Sequence[int], found: dict[str, Tensor]) -> None:
        """Sets tensors, by name, at the positions of these episodes."""
        index = self.index(rows)
        for name, tensor in found.items():
            getattr(self, name)[index] = tensor.to(index.device)

    @property
    def lengths(self) -> list[int]:
        return [end - first for first, end in itertools.pairwise(self.starts)]

    def spread(self, x: Tensor) -> Tensor:
        """x (B,) of each episode at all its positions: (N,)."""
        return x.repeat_interleave(torch.tensor(self.lengths, device=x.device))

    def sums(self, x: Tensor) -> Tensor:
        """Sums (B,) of x (N,) over the tokens of each response."""
        return torch.stack([row.sum() for row in torch.where(self.mask, x, 0).split(self.lengths)])

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor(self.starts, dtype=torch.int32, device=self.tokens.device)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)


def check_same(episodes: Episodes, drawn: Tensor) -> None:
    """Stops at the first token whose log-probability the generator and the trainer disagree on."""
    differ = (drawn.view(torch.int32) != episodes.old_logprobs.view(torch.int32)).nonzero()
    if not len(differ):
        return
    at = int(differ[0])
    row = bisect_right(episodes.starts, at) - 1
    raise UserError(
        f"--strict: after prompt {row} of this iteration, token {int(episodes.targets[at])} at "
        f"position {at + 1 - episodes.starts[row]} has log-probability {float(drawn[at])!r} from "
        f"the generator, but {float(episodes.old_logprobs[at])!r} from the trainer; {len(differ)} "
        f"of {int(episodes.mask.sum())} differ"
    )
