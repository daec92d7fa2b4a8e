"""PPO against TRL's trainer, and against the papers' formulas, token by token, in float64.

fixtures/trl_ppo.npz holds what PPOTrainer of TRL 0.24 computed, in float64, on inputs that are
float32 numbers (fixtures/make_trl_ppo.py says how). Each comparison is two: our reference in
float64 gives TRL's numbers to 1e-12, and our kernels are as near to them as the house's rule asks.

TRL is like `--score-at after_end --truncated zero --missing-eos subtract`, and otherwise in this:

1. An end that is the last of the most tokens that a response may have: TRL pays the score at the
   end itself, having no column behind it; we have a state there, as behind every other end.
2. Whitening divides by n − 1; our trainer by n, as Huang et al. do (the op has `unbiased`).
3. The value loss is a mean over the states, of which an ended response has one more than it has
   tokens; our trainer divides both losses by the number of tokens.
4. With gradient accumulation TRL takes the mean of the micro-batches' means; we divide by the
   tokens of the whole minibatch, so that its parts add up. (And since it steps every so many
   micro-batches whatever `num_mini_batches` is, minibatches are then not steps.)
5. Statistics: approximate KL and ratio are means over all columns, padding included, where the
   ratio is 1; the entropy counts −1 nat for each padding token, the value that hides it. Ours are
   masked.
6. TRL divides logits by the temperature + 1e-7, and does not clamp log-ratios. `kl_estimator="k3"`
   puts k3 into the reward; here k3 is of the loss alone.

What differs is put into the call below, where its number stands; the comparison stays exact.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from instructcore.data import Prompt
from instructcore.episodes import Episodes
from instructcore.evaluate import Sample
from instructcore.ops import (
    ppo_advantage,
    ppo_advantage_reference,
    ppo_loss,
    ppo_loss_reference,
    whiten_advantages,
    whiten_advantages_reference,
)
from instructcore.ppo import penalise_missing_eos
from instructcore.scheduler import Completion

TRL = np.load(Path(__file__).parent / "fixtures" / "trl_ppo.npz")
NOTE = json.loads(str(TRL["note"]))
CASES = NOTE["cases"]


def trl(name: str) -> Tensor:
    return torch.from_numpy(TRL[name])


class Case:
    """A case of TRL's as the trainer packs it, or some rows of it."""

    def __init__(self, name: str, rows: Tensor | None = None) -> None:
        self.tokens, self.kept = (~trl(f"{name}/{x}") for x in ("padding_mask", "padding_mask_p1"))
        self.samples = []
        texts = zip(trl(f"{name}/queries"), trl(f"{name}/responses"), self.tokens, strict=True)
        for query, response, mask in texts:
            prompt, ids = query[query != NOTE["pad"]].tolist(), response[mask].tolist()
            reason, zeros = "stop" if ids[-1] == NOTE["eos"] else "length", [0.0] * len(ids)
            completion = Completion(ids, zeros, zeros, reason, "")
            self.samples.append(Sample(Prompt("", {}), prompt, completion))
        self.episodes = Episodes.of(self.samples, torch.device("cpu"))
        self.ended = torch.tensor([s.ended for s in self.samples])
        self.fills = self.ended & self.tokens.all(1)  # 1.
        self.episodes.states[self.episodes.cu_seqlens[1:].long()[self.ended & ~self.fills] - 1] = (
            True
        )
        if rows is not None:
            self.episodes = self.episodes.take(rows.tolist())
            self.tokens, self.kept = self.tokens[rows], self.kept[rows]

    def pack(self, x: Tensor) -> Tensor:
        """(N,) of TRL's (B, T): NaN where there is no state."""
        packed = x.new_full(self.episodes.states.shape, math.nan)
        packed[self.episodes.states] = x[self.kept]
        return packed


def assert_golden(ours: Tensor, native: Tensor, exact: Tensor, truth: Tensor, name: str) -> None:
    """`exact`, our reference in float64, is TRL's `truth`; and so is `ours` by the house's rule."""
    error = float((exact.cpu() - truth).abs().max())
    assert error <= 1e-12 * float(truth.abs().max()), f"{name}: {error:.3e} off"
    assert_close(ours, native, truth, name=name)


@pytest.mark.kernel("ppo_advantage")
@pytest.mark.parametrize("case", CASES)
def test_rewards_advantages_and_returns_are_trls(case, device):
    said, golden = CASES[case], Case(case)
    mask, states = (x.to(device) for x in (golden.episodes.mask, golden.episodes.states))
    options = {name: said[name] for name in ("kl_coef", "gamma", "whiten_rewards")}
    options |= {"lambda_": said["lam"], "cu_seqlens": golden.episodes.cu_seqlens.to(device)}

    def targets(op, whiten, dtype):
        raw, penalty = trl(f"{case}/raw_scores").to(dtype), said["missing_eos_penalty"] or 0.0
        scores = penalise_missing_eos(raw, golden.ended, "subtract", penalty).to(device)
        given = (trl(f"{case}/{x}").to(dtype) for x in ("logprobs", "ref_logprobs", "values"))
        given = (golden.pack(x).to(device) for x in given)
        found = op(scores, *given, states, whiten=False, unbiased=True, **options)  # 2.
        taken = found.advantages[mask]
        white = whiten(found.advantages, mask, taken.mean(), taken.var())  # 2.
        of_states = {"rewards": found.rewards, "advantages": white, "returns": found.returns}
        return {"scores": scores} | {name: x[states] for name, x in of_states.items()}

    ours = targets(ppo_advantage, whiten_advantages, torch.float32)
    reference = ppo_advantage_reference, whiten_advantages_reference
    native, exact = (targets(*reference, dtype) for dtype in (torch.float32, torch.float64))
    for name in ours:
        truth = trl(f"{case}/{name}")
        if name != "scores":
            assert not truth[~golden.kept].any()
            truth = truth[golden.kept]
        assert_golden(ours[name], native[name], exact[name], truth, name)


@pytest.mark.kernel("ppo_loss")
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_trls(case, device):
    said, names = CASES[case], ("loss", "policy_loss", "value_loss", "d_logprobs", "d_values")
    old = {"old_logprobs": "logprobs", "old_values": "values"}
    old |= {"advantages": "advantages", "returns": "returns"}

    def losses(op, dtype, number):
        """Ours and TRL's, of one backward."""
        rows = trl(f"{case}/{number}/rows")
        golden = Case(case, rows)
        states, kept = golden.episodes.states.to(device), golden.kept
        columns, count, tokens = kept.numel(), int(kept.sum()), int(golden.tokens.sum())
        given = {ours: trl(f"{case}/{theirs}")[rows] for ours, theirs in old.items()}
        given |= {name: trl(f"{case}/{number}/{name}") for name in ("logprobs", "values")}
        given = {name: golden.pack(x.to(dtype)).to(device) for name, x in given.items()}
        new = [given[name].requires_grad_() for name in ("logprobs", "values")]
        loss, stats = op(
            **given,
            mask=states,
            clip_range=said["cliprange"],
            value_clip_range=said["cliprange_value"],
            value_coef=said["vf_coef"] * tokens / count,  # 3.
            normalizer=float(tokens),  # 4.
        )
        loss.backward()
        means = stats.total("policy_loss") / tokens, stats.total("value_loss") / count  # 3.
        ours = dict(zip(names, (loss, *means, *(x.grad[states] for x in new)), strict=True))
        theirs = {name: trl(f"{case}/{number}/{name}") for name in names}
        counts = {"clipped": ("pg_clipfrac", tokens), "value_clipped": ("vf_clipfrac", count)}
        for name, (share, n) in counts.items():
            ours[name] = stats.total(name)
            theirs[name] = (trl(f"{case}/{share}")[number] * n).round()  # their share is a float32
        ours["approx_kl"] = stats.total("approx_kl") / columns  # 5.
        ours["ratio"] = (stats.total("ratio") + columns - count) / columns  # 5.
        theirs["approx_kl"] = trl(f"{case}/approxkl")[number]
        theirs["ratio"] = trl(f"{case}/ratio")[number]
        return ours, {name: x[kept] if x.ndim else x for name, x in theirs.items()}

    def whole(op, dtype):
        """All the case's backwards in a row: the rule's maxima want more than one number."""
        count = sum(name.endswith("/rows") for name in TRL.files if name.startswith(f"{case}/"))
        for side in zip(*(losses(op, dtype, number) for number in range(count)), strict=True):
            yield {name: torch.cat([x[name].reshape(-1) for x in side]) for name in side[0]}

    ours, theirs = whole(ppo_loss, torch.float32)
    native, _ = whole(ppo_loss_reference, torch.float32)
    exact, _ = whole(ppo_loss_reference, torch.float64)
    for name, truth in theirs.items():
        assert_golden(ours[name], native[name], exact[name], truth, name)
