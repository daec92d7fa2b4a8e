"""PPO against TRL's trainer, and against the papers' formulas, token by token, in float64.

fixtures/trl_ppo.npz holds what PPOTrainer of TRL 0.24 computed, in float64, on inputs that are
float32 numbers (fixtures/make_trl_ppo.py says how). Each comparison is two: our reference in
float64 gives TRL's numbers to 1e-12, and our kernels are as near to them as the house's rule asks.

TRL is like `--score-at after_end --truncated zero --missing-eos subtract`, and otherwise in this:

1. An end that is the last of the most tokens that a response may have: TRL pays the score at the
   end itself, having no column behind it; we have a state there, as behind every other end.
2. Whitening divides by n − 1; our trainer by n, as lm-human-preferences does (the op has
   `unbiased`).
3. The value loss is a mean over the states, of which an ended response has one more than it has
   tokens; our trainer divides both losses by the number of tokens.
4. With gradient accumulation TRL takes the mean of the micro-batches' means; we divide by the
   tokens of the whole minibatch, so that its parts add up. (TRL then steps once in
   `gradient_accumulation_steps` micro-batches, wherever its minibatches end.)
5. Statistics: approximate KL and ratio are means over all columns, padding included, where the
   ratio is 1; the entropy counts −1 nat for each padding token, the value that hides it. Ours are
   masked.
6. TRL divides logits by the temperature + 1e-7, and does not clamp log-ratios. `kl_estimator="k3"`
   puts k3 into the reward; here k3 is of the loss alone.

What differs is put into the call below, where its number stands; the comparison stays exact.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tolerance import assert_close, assert_same_bits
from torch import Tensor

from instructcore.data import Prompt
from instructcore.episodes import Episodes
from instructcore.evaluate import Sample
from instructcore.model import GPT, load
from instructcore.ops import (
    ppo_advantage,
    ppo_advantage_reference,
    ppo_loss,
    ppo_loss_reference,
    whiten_advantages,
    whiten_advantages_reference,
)
from instructcore.ppo import (
    PPO,
    PPOConfig,
    penalise_missing_eos,
    response_logprobs,
    state_values,
)
from instructcore.reward import response_scores
from instructcore.scheduler import Completion

TRL = np.load(Path(__file__).parent / "fixtures" / "trl_ppo.npz")
NOTE = json.loads(str(TRL["note"]))
CASES = NOTE["cases"]
# Our names of what a loss takes from the rollouts, and TRL's of the same in two places.
OLD = {"old_logprobs": "logprobs", "old_values": "values"}
OLD |= {"advantages": "advantages", "returns": "returns"}


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
        last = self.episodes.cu_seqlens[1:].long() - 1
        self.episodes.states[last[self.ended & ~self.fills]] = True
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
    error = float((exact.detach().cpu() - truth).abs().max())
    assert error <= 1e-12 * float(truth.abs().max()), f"{name}: {error:.3e} off"
    assert_close(ours, native, truth, name=name)


def targets(case: str, op, whiten, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """TRL's numbers by these two functions: scores (B,), and the rest at the states."""
    said, golden = CASES[case], Case(case)
    mask, states = (x.to(device) for x in (golden.episodes.mask, golden.episodes.states))
    raw, penalty = trl(f"{case}/raw_scores").to(dtype), said["missing_eos_penalty"] or 0.0
    scores = penalise_missing_eos(raw, golden.ended, "subtract", penalty).to(device)
    given = (trl(f"{case}/{x}").to(dtype) for x in ("logprobs", "ref_logprobs", "values"))
    found = op(
        scores,
        *(golden.pack(x).to(device) for x in given),
        states,
        kl_coef=said["kl_coef"],
        gamma=said["gamma"],
        lambda_=said["lam"],
        cu_seqlens=golden.episodes.cu_seqlens.to(device),
        whiten_rewards=said["whiten_rewards"],
        whiten=False,
        unbiased=True,  # 2.
    )
    taken = found.advantages[mask]
    white = whiten(found.advantages, mask, taken.mean(), taken.var())  # 2.
    of_states = {"rewards": found.rewards, "advantages": white, "returns": found.returns}
    return {"scores": scores} | {name: x[states] for name, x in of_states.items()}


REFERENCE = ppo_advantage_reference, whiten_advantages_reference


@pytest.mark.kernel("ppo_advantage")
@pytest.mark.parametrize("case", CASES)
def test_rewards_advantages_and_returns_are_trls(case, device):
    ours = targets(case, ppo_advantage, whiten_advantages, torch.float32, device)
    native, exact = (targets(case, *REFERENCE, x, device) for x in (torch.float32, torch.float64))
    kept = Case(case).kept
    for name in ours:
        truth = trl(f"{case}/{name}")
        if name != "scores":
            assert not truth[~kept].any()
            truth = truth[kept]
        assert_golden(ours[name], native[name], exact[name], truth, name)


@pytest.mark.kernel("ppo_loss")
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_trls(case, device):
    said, names = CASES[case], ("loss", "policy_loss", "value_loss", "d_logprobs", "d_values")

    def losses(op, dtype, number):
        """Ours and TRL's, of one backward."""
        rows = trl(f"{case}/{number}/rows")
        golden = Case(case, rows)
        states, kept = golden.episodes.states.to(device), golden.kept
        columns, count, tokens = kept.numel(), int(kept.sum()), int(golden.tokens.sum())
        given = {ours: trl(f"{case}/{theirs}")[rows] for ours, theirs in OLD.items()}
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


def load_model(name: str, tensors: Tensor, directory: Path) -> GPT:
    """The model with these weights, which lie end to end, through a Hugging Face checkpoint."""
    parameters = NOTE["parameters"][name]
    parts = tensors.float().split([math.prod(shape) for _, shape in parameters])
    scalar = name in ("critic", "reward")
    kind = "GPT2ForSequenceClassification" if scalar else "GPT2LMHeadModel"
    directory.mkdir(parents=True)
    config = {"model_type": "gpt2", "architectures": [kind], "id2label": {"0": "score"}}
    (directory / "config.json").write_text(json.dumps(config | NOTE["shape"]))
    named = {n: x.view(shape).clone() for (n, shape), x in zip(parameters, parts, strict=True)}
    save_file(named, directory / "model.safetensors")
    return load(directory)


def end_to_end(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


def test_trainer_is_trls(tmp_path):
    """From weights to log-probabilities, values, scores and returns, and to weights' gradients."""
    case, number = NOTE["whole"]
    said, golden, backward = CASES[case], Case(case), f"{case}/{number}"
    rows = trl(f"{backward}/rows")
    later = Case(case, rows)
    tokens, count = int(later.tokens.sum()), int(later.kept.sum())
    config = PPOConfig(
        **{"init": "-", "reward": "-", "prompts": ("-",), "batch": len(golden.samples)},
        **{"minibatch": len(rows), "score_at": "after_end", "missing_eos": "subtract"},
        missing_eos_penalty=said["missing_eos_penalty"],
        kl_coef=said["kl_coef"],
        gamma=said["gamma"],
        lambda_=said["lam"],
        temperature=said["temperature"],
        clip_range=said["cliprange"],
        value_clip_range=said["cliprange_value"],
        value_coef=said["vf_coef"] * tokens / count,  # 3.
    )

    def model(name: str, key: str = "weights") -> GPT:
        return load_model(name, trl(f"{key}/{name}"), tmp_path / key / name)

    def trainer(key: str) -> PPO:
        models = model("policy", key), model("critic", key), reference
        return PPO(config, *models, None, None, [Prompt("", {})])

    def check(x: Tensor, name: str, kept: Tensor | slice = slice(None)) -> None:
        stem, _, last = name.rpartition("/")
        native, truth = (trl(n)[kept] for n in (f"{stem}/float32/{last}", name))
        assert_close(x.detach(), native, truth, name=name)

    # The rollouts' side, with the first weights.
    reference, e = model("reference"), golden.episodes
    ppo = trainer("weights")
    ppo.assess(e, range(len(golden.samples)))
    with torch.no_grad():
        e.old_logprobs = response_logprobs(ppo.policy, e, config.temperature).logprobs
        scores = response_scores(model("reward"), [list(s.sequence) for s in golden.samples])
    check(scores, f"{case}/raw_scores")
    check(e.old_logprobs[e.mask], f"{case}/logprobs", golden.tokens)
    check(e.ref_logprobs[e.mask], f"{case}/ref_logprobs", golden.tokens)
    check(e.values[e.states], f"{case}/values", golden.kept)

    # From here on with TRL's numbers, so that none of our rounding is carried along.
    for ours, theirs in OLD.items():
        ours = ours.replace("old_values", "values")
        setattr(later.episodes, ours, later.pack(trl(f"{case}/{theirs}").float()[rows]))
    for name in ("logprobs", "ref_logprobs", "values"):
        ours = "old_logprobs" if name == "logprobs" else name
        setattr(e, ours, golden.pack(trl(f"{case}/{name}")).nan_to_num(0.0))
    alike = golden.kept & ~golden.fills[:, None]  # 1.
    at = golden.pack(alike.float()) == 1
    native = targets(case, *REFERENCE, torch.float32, "cpu")["returns"][alike[golden.kept]]
    metrics = ppo.estimate(e, golden.samples, trl(f"{case}/raw_scores"))
    assert_close(e.returns[at], native, trl(f"{case}/returns")[alike], name="returns")
    hidden = int((~golden.tokens).sum()) / len(golden.samples)
    assert metrics["objective/kl"] == pytest.approx(float(trl(f"{case}/kl")), rel=1e-6)
    entropy = float(trl(f"{case}/entropy")) + hidden  # 5.
    assert metrics["objective/entropy"] == pytest.approx(entropy, rel=1e-6)

    # The minibatch of an update, with the weights that TRL had then.
    ppo, part = trainer(f"{backward}/weights"), later.episodes
    new = response_logprobs(ppo.policy, part, config.temperature).logprobs
    check(new[part.mask], f"{backward}/logprobs", later.tokens)
    check(state_values(ppo.critic, part)[part.states], f"{backward}/values", later.kept)
    ppo.loss(part, float(tokens))[0].backward()  # 4.
    for name, ours in (("policy", ppo.policy), ("critic", ppo.critic)):
        keys = f"{backward}/float32/gradient", f"{backward}/gradient"
        native, truth = (end_to_end(model(name, key).parameters()) for key in keys)
        assert_close(end_to_end(p.grad for p in ours.parameters()), native, truth, name=name)


# ---- Random configurations, against loops over their tokens

SEEDS, PER_SEED = 12, 100
GIVEN = "logprobs old_logprobs ref_logprobs advantages values old_values returns entropy weights"
GIVEN = tuple(GIVEN.split())


@dataclass
class Row:
    """An episode: arrays over its steps, of which `mask` says which count."""

    mask: list[bool]
    dones: list[bool]
    given: dict[str, np.ndarray]  # float32, NaN where masked
    score: float
    score_index: int
    bootstrap: float


@dataclass
class Configuration:
    rows: list[Row]
    targets: dict  # settings of ppo_advantage
    losses: dict  # settings of ppo_loss
    has_values: bool
    has_dones: bool
    has_score_index: bool
    has_bootstrap: bool
    packed: bool


def choose(draw: np.random.Generator, *values):
    return values[draw.integers(len(values))]


def random_row(draw: np.random.Generator) -> Row:
    n, share = choose(draw, 0, 1, 1, 2, 3, 7, 16, 33), choose(draw, 0.0, 0.5, 0.8, 1.0)
    mask = draw.random(n) < share
    given = {name: draw.normal(size=n) for name in GIVEN}
    given["logprobs"] = given["old_logprobs"] + draw.normal(size=n) * choose(draw, 0.0, 0.2, 0.6)
    given["values"] = given["old_values"] + draw.normal(size=n) * choose(draw, 0.0, 0.2, 1.0)
    given["weights"] = draw.uniform(0.5, 2.0, n)
    given = {name: np.where(mask, x, np.nan).astype(np.float32) for name, x in given.items()}
    dones, at = draw.random(n) < 0.1, int(draw.integers(-1, n)) if n else -1
    score, bootstrap = (float(np.float32(x)) for x in draw.normal(size=2))
    return Row(mask.tolist(), dones.tolist(), given, score, at, bootstrap)


def random_configuration(draw: np.random.Generator) -> Configuration:
    targets = {
        "kl_coef": choose(draw, 0.0, 0.02, 0.5),
        "gamma": choose(draw, 0.0, 0.9, 1.0),
        "lambda_": choose(draw, 0.0, 0.5, 0.95, 1.0),
        "reward_clip": choose(draw, None, 0.5),
        "whiten_rewards": choose(draw, False, True),
        "whiten": choose(draw, False, True),
        "unbiased": choose(draw, False, True),
    }
    aggregate = choose(draw, "token", "sequence", "constant")
    losses = {
        "clip_range": choose(draw, 0.0625, 0.25),
        "clip_range_high": choose(draw, None, 0.375),
        "dual_clip": choose(draw, None, 1.5),
        "value_clip_range": choose(draw, None, 0.25),
        "value_coef": choose(draw, 0.1, 1.0),
        "entropy_coef": choose(draw, 0.0, 0.01),
        "kl_coef": choose(draw, 0.0, 0.05),
        "aggregate": aggregate,
        "normalizer": 37.0 if aggregate == "constant" else choose(draw, None, 5.0),
    }
    rows = [random_row(draw) for _ in range(draw.integers(0, 6))]
    return Configuration(rows, targets, losses, *(bool(x) for x in draw.integers(0, 2, 5)))


def whitened(x: list, real: type, keep_mean: bool, unbiased: bool) -> list:
    """(x − mean) / √(variance + 1e-8), and the mean again if kept."""
    n = len(x)
    if n < 2:
        return x
    mean = sum(x, real(0)) / real(n)
    variance = sum(((y - mean) ** 2 for y in x), real(0)) / real(n - unbiased)
    return [(y - mean) / np.sqrt(variance + real(1e-8)) + (mean if keep_mean else 0) for y in x]


def targets_by_hand(c: Configuration, real: type) -> dict[str, list]:
    """Rewards, advantages and returns of the unmasked tokens, one after another, in type `real`."""
    s, steps = c.targets, []
    for row in c.rows:
        kept = [t for t, m in enumerate(row.mask) if m]
        paid_at = row.score_index if c.has_score_index else kept[-1] if kept else None
        bound = s["reward_clip"]
        score = row.score if bound is None else min(max(row.score, -bound), bound)
        old, ref = (row.given[x].astype(real) for x in ("old_logprobs", "ref_logprobs"))
        for t in kept:
            reward = -real(s["kl_coef"]) * (old[t] - ref[t])
            steps.append(reward + real(score) if t == paid_at else reward)
    rewards, gamma, lambda_ = steps, real(s["gamma"]), real(s["lambda_"])
    if s["whiten_rewards"]:
        rewards = whitened(rewards, real, True, s["unbiased"])
    advantages, returns, end = [], [], 0
    for row in c.rows:
        first, end = end, end + sum(row.mask)
        value = real(row.bootstrap if c.has_bootstrap else 0)
        advantage, left, of_row = real(0), list(rewards[first:end]), []
        for t in reversed(range(len(row.mask))):
            if c.has_dones and row.dones[t]:
                value, advantage = real(0), real(0)
            if row.mask[t]:
                before = real(row.given["old_values"][t])
                delta = left.pop() + gamma * value - before
                advantage = delta + gamma * lambda_ * advantage
                value = before
                of_row.append((advantage, advantage + before))
        advantages += [a for a, _ in reversed(of_row)]
        returns += [r for _, r in reversed(of_row)]
    if s["whiten"]:
        advantages = whitened(advantages, real, False, s["unbiased"])
    return {"rewards": rewards, "advantages": advantages, "returns": returns}


def losses_by_hand(c: Configuration, real: type) -> tuple[dict[str, list], float]:
    """Losses and gradients in type `real`, and how far the nearest token is from any kink."""
    s, margin = c.losses, math.inf
    low, high = 1 - s["clip_range"], 1 + (s["clip_range_high"] or s["clip_range"])
    counts = [sum(row.mask) for row in c.rows]
    total = {"token": sum(counts), "sequence": sum(n > 0 for n in counts)}.get(s["aggregate"])
    normalizer = real(s["normalizer"] or max(total, 1))
    found = {x: [] for x in ("d_logprobs", "d_values", "d_entropy")}
    loss, policy_loss, value_loss = real(0), real(0), real(0)
    for row, count in zip(c.rows, counts, strict=True):
        given = {name: x.astype(real) for name, x in row.given.items()}
        for t in (t for t, m in enumerate(row.mask) if m):
            x = {name: array[t] for name, array in given.items()}
            a = x["advantages"]
            ratio = np.exp(x["logprobs"] - x["old_logprobs"])
            policy, clipped = -ratio * a, -min(max(ratio, real(low)), real(high)) * a
            slope = policy  # by the log-probability: that of exp is itself
            if clipped > policy:
                policy, slope = clipped, real(0)
            kinks = [ratio - low, ratio - high]
            if s["dual_clip"] and a < 0:
                kinks.append(ratio - s["dual_clip"])
                if policy > -real(s["dual_clip"]) * a:
                    policy, slope = -real(s["dual_clip"]) * a, real(0)
            policy, slope = policy * x["weights"], slope * x["weights"]
            value, value_slope, error = real(0), real(0), x["values"] - x["returns"]
            if c.has_values:
                value, value_slope = error**2 / 2, error
                step, bound = x["values"] - x["old_values"], s["value_clip_range"]
                kinks.append(1.0 if bound is None else abs(step) - bound)
                if bound is not None and abs(step) > bound:
                    error = x["old_values"] + np.sign(step) * real(bound) - x["returns"]
                    kinks.append(error**2 / 2 - value)
                    if error**2 / 2 > value:
                        value, value_slope = error**2 / 2, real(0)
            away = x["ref_logprobs"] - x["logprobs"]
            k3, k3_slope = np.exp(away) - 1 - away, 1 - np.exp(away)
            share = 1 / normalizer / real(count if s["aggregate"] == "sequence" else 1)
            kl, value_coef, bonus = (real(s[n]) for n in ("kl_coef", "value_coef", "entropy_coef"))
            loss += share * (policy + value_coef * value - bonus * x["entropy"] + kl * k3)
            policy_loss, value_loss = policy_loss + policy, value_loss + value
            found["d_logprobs"].append(share * (slope + kl * k3_slope))
            found["d_values"].append(share * value_coef * value_slope)
            found["d_entropy"].append(-share * bonus)
            margin = min(margin, *map(abs, kinks))
    found |= {"loss": [loss], "policy_loss": [policy_loss], "value_loss": [value_loss]}
    return found, margin


@functools.cache
def configurations(seed: int) -> list[Configuration]:
    """Without those where a rounding would decide which side of a kink a token is on."""
    draw, found = np.random.default_rng(seed), []
    while len(found) < PER_SEED:
        drawn = random_configuration(draw)
        if losses_by_hand(drawn, np.float64)[1] > 1e-5:
            found.append(drawn)
    return found


def by_kernels(c: Configuration, device: str) -> dict[str, Tensor]:
    longest = max((len(row.mask) for row in c.rows), default=0)

    def lay(arrays: list, fill, dtype: torch.dtype) -> Tensor:
        """Rows end to end, or padded to the longest."""
        rows = [torch.from_numpy(np.asarray(x)).to(dtype) for x in arrays]
        if not c.packed:
            rows = [torch.cat([x, x.new_full((longest - len(x),), fill)]) for x in rows]
            return (
                torch.stack(rows).to(device) if rows else torch.zeros(0, 4, dtype=dtype).to(device)
            )
        return torch.cat([torch.zeros(0, dtype=dtype), *rows]).to(device)

    def of_rows(wanted: bool, name: str, dtype: torch.dtype) -> Tensor | None:
        values = [getattr(row, name) for row in c.rows]
        return torch.tensor(values, dtype=dtype, device=device) if wanted else None

    x = {n: lay([row.given[n] for row in c.rows], math.nan, torch.float32) for n in GIVEN}
    mask = lay([row.mask for row in c.rows], False, torch.bool)
    starts = np.cumsum([0, *(len(row.mask) for row in c.rows)])
    packing = {"cu_seqlens": torch.tensor(starts, dtype=torch.int32, device=device)}
    packing = packing if c.packed else {}
    targets = ppo_advantage(
        of_rows(True, "score", torch.float32),
        *(x["old_logprobs"], x["ref_logprobs"], x["old_values"], mask),
        dones=lay([row.dones for row in c.rows], False, torch.bool) if c.has_dones else None,
        score_index=of_rows(c.has_score_index, "score_index", torch.int64),
        bootstrap=of_rows(c.has_bootstrap, "bootstrap", torch.float32),
        **packing,
        **c.targets,
    )
    leaves = {name: x[name].requires_grad_() for name in ("logprobs", "values", "entropy")}
    critic = ("values", "old_values", "returns")
    given = {name: y for name, y in x.items() if c.has_values or name not in critic}
    loss, stats = ppo_loss(mask=mask, **given, **packing, **c.losses)
    found = {"loss": loss} | {name: stats.total(name) for name in ("policy_loss", "value_loss")}
    loss.backward()
    with torch.no_grad():
        assert_same_bits(ppo_loss(mask=mask, **given, **packing, **c.losses)[0], loss.detach())
    for name, leaf in leaves.items():
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert not gradient[~mask].any()
        found[f"d_{name}"] = gradient[mask]
    for name in ("rewards", "advantages", "returns"):
        assert not getattr(targets, name)[~mask].any()
        found[name] = getattr(targets, name)[mask]
    return found


def by_hand(c: Configuration, real: type) -> dict[str, list]:
    return targets_by_hand(c, real) | losses_by_hand(c, real)[0]


@pytest.mark.kernel("ppo_loss")
@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_configurations(seed, device):
    """All of a seed at once: the rule's maxima would be chance over a token or two."""
    drawn = configurations(seed)
    ours = [by_kernels(c, device) for c in drawn]
    native, truth = ([by_hand(c, real) for c in drawn] for real in (np.float32, np.float64))
    for name in ours[0]:
        flat = [np.array([y for x in xs for y in x[name]]) for xs in (native, truth)]
        assert [x.dtype for x in flat] == [np.float32, np.float64]
        mine = torch.cat([x[name].detach().reshape(-1) for x in ours])
        assert_close(mine, *map(torch.from_numpy, flat), name=name)


def test_random_configurations_have_everything():
    drawn = [c for seed in range(SEEDS) for c in configurations(seed)]
    masks = [row.mask for c in drawn for row in c.rows]
    holes = sum(any(m) and not all(m[m.index(True) : len(m) - m[::-1].index(True)]) for m in masks)
    assert len(drawn) >= 1000 and holes >= 100
    for few in (
        [m for m in masks if not m],
        [m for m in masks if len(m) == 1],
        [m for m in masks if sum(m) == 1],
        [m for m in masks if m and not any(m)],
        [c for c in drawn if not c.rows],
        [c for c in drawn if c.rows and not any(any(row.mask) for row in c.rows)],
    ):
        assert len(few) >= 20
    for settings in ([c.targets for c in drawn], [c.losses for c in drawn]):
        for name in settings[0]:
            assert len({s[name] for s in settings}) > 1, f"{name} is always the same"
