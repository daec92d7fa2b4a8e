"""Reinforcement learning from human feedback: InstructGPT's PPO and its pre-training mix, PPO-ptx.

One iteration, t over the tokens of a response y to a prompt x:

    y ~ π(· | x)                              rollouts at temperature 1, nothing truncated
    r_t = −β (log π(y_t) − log π_SFT(y_t))    plus the judge's score at the last token
    δ_t = r_t + γ V_{t+1} − V_t,   A_t = Σ_l (γλ)^l δ_{t+l},   R_t = A_t + V_t;   A whitened
    ρ_t = π_new(y_t) / π(y_t)
    minimise  max(−ρ_t A_t, −clip(ρ_t, 1 ± ε) A_t) + c ½ max((V − R)², (V_clipped − R)²)
              − γ_ptx log π_new(pre-training text)

Everything is packed: position p of a sequence predicts token p + 1, so log-probability, value,
reward and advantage of a response's token live at the position BEFORE it, and a mask says where
those are. log π is the generator's: on the CPU it has the bits of the trainer's forward, whatever
the batch, so before the first update the log-ratios are 0 to the last bit (`--strict` checks it). A
GPU's matrix products differ from batch to batch: there log π is computed again, on the same packed
micro-batches that the first inner epoch trains on.

Sources: Ouyang et al. 2022 (arXiv:2203.02155), §3.5 and appendix C.4; Stiennon et al. 2020
(arXiv:2009.01325); Huang et al. 2024 (arXiv:2403.17031), "N+". presets.py names the source of each
value, and what the papers leave open as our choice.

`--algorithm` grpo, dr_grpo and rloo compare the K responses to a prompt instead: no critic, and
one A for all tokens of a response (`group_advantages`). The rest is the same.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from . import ops, parallel, report
from .config import (
    OptimConfig,
    RunConfig,
    check,
    check_divides,
    check_options,
    flatten,
    group,
    option,
    options,
)
from .data import EpochOrder, Prompt, TokenStream, pieces, read_prompts, report_dropped
from .episodes import Episodes, check_same
from .evaluate import (
    Judge,
    ModelJudge,
    RewardFunction,
    Sample,
    make_judge,
    sample_responses,
    score_samples,
)
from .generate import SamplingParams
from .guards import Guard, GuardConfig
from .model import GPT, load
from .presets import ALGORITHMS, OUR_CHOICE, PRESETS, Table
from .pretrain import count_targets, micro_batches, next_token_loss, to_device
from .tokenizer import Tokenizer
from .train import AdamW, Metrics, Run, TrainState, learning_rate, mix, resolve_checkpoint
from .train import update as apply_gradients

# Streams of randomness within a step, so that none repeats another.
SAMPLING, SHUFFLE, PRETRAIN, CRITIC = 1, 2, 3, 4
HELD_OUT = 0.1  # of each file of pre-training text, at its end: as `pretrain` keeps it unseen


@dataclass(frozen=True)
class PPOConfig:
    """Settings of `instructcore ppo`. A step is an iteration: rollouts, then epochs over them.

    A preset replaces the settings at their defaults, but none named in `given`.
    """

    init: str = option("", "checkpoint of the policy; frozen, the KL reference", required=True)
    reward: str = option("", "reward model's checkpoint, or module:function", required=True)
    prompts: tuple[str, ...] = option((), "files of prompts", required=True)
    preset: str = option("small", "sets what no flag sets", choices=tuple(PRESETS))
    algorithm: str = option(
        "ppo",
        "ppo has a critic; the others compare groups, and set group-size, kl-in and aggregate",
        choices=tuple(ALGORITHMS),
    )
    group_size: int = option(1, "responses per prompt", unit="sequences", range="[1, inf)")
    steps: int = option(
        40, "length of the run", unit="iterations", paper="500, 256k episodes", range="[1, inf)"
    )
    batch: int = option(
        128, "rollouts per iteration", unit="sequences", paper="512", range="[1, inf)"
    )
    minibatch: int = option(
        32, "rollouts per update", unit="sequences", paper="64", range="[1, inf)"
    )
    micro_batch: int = option(
        0, "rollouts at once, 0 = minibatch", unit="sequences", range="[0, inf)"
    )
    inner_epochs: int = option(1, "passes over the rollouts", paper="1", range="[1, inf)")
    max_tokens: int = option(64, "longest response", unit="tokens", paper="1024", range="[1, inf)")
    temperature: float = option(1.0, "of rollouts and log-probs", paper="1", range="(0, inf)")

    kl_coef: float = option(
        0.05, "β, of the KL penalty", unit="per nat", paper="0.02", range="[0, inf)"
    )
    kl_in: str = option(
        "reward",
        "where the penalty is: log-ratios in the reward, or k3 in the loss",
        paper="reward",
        choices=("reward", "loss"),
    )
    kl_target: float = option(
        0.0, "β adapts to this KL, 0 = fixed", unit="nats per response", range="[0, inf)"
    )
    kl_horizon: float = option(1e4, "how slowly β adapts", unit="episodes", range="(0, inf)")
    missing_eos: str = option(
        "subtract",
        "unended responses: penalty off the score, or -penalty for a score",
        choices=("none", "subtract", "replace"),
    )
    missing_eos_penalty: float = option(1.0, "that penalty", unit="score", range="[0, inf)")
    truncated: str = option(
        "zero",
        "unended responses: then comes 0, or V (bootstrap); or they are not learnt from (drop)",
        choices=("zero", "bootstrap", "drop"),
    )
    score_at: str = option(
        "last",
        "the score's place: the last token, or the state after an end, which then has a V too",
        paper="last",
        choices=("last", "after_end"),
    )
    reward_clip: float = option(
        0.0, "scores are clipped to ± this, 0 = not", unit="score", range="[0, inf)"
    )
    whiten_rewards: bool = option(False, "rewards scaled to variance 1, their mean kept")

    gamma: float = option(1.0, "discount", unit="per token", paper="1", range="[0, 1]")
    lambda_: float = option(0.95, "λ of the advantage estimate", range="[0, 1]")
    clip_range: float = option(0.2, "ε, clip of the ratio", paper="0.2", range="(0, inf)")
    clip_range_high: float = option(0.0, "upper ε, 0 = the same", range="[0, inf)")
    dual_clip: float = option(0.0, "if A < 0 the loss is at most this × |A|", range="[0, inf)")
    aggregate: str = option(
        "token",
        "mean over tokens, mean of the sequences' means, or sum / (minibatch × max_tokens)",
        choices=("token", "sequence", "constant"),
    )
    importance_cap: float = option(
        0.0, "π / generator's π weighs the loss, up to this; 0 = not", range="[0, inf)"
    )
    value_clip_range: float = option(0.2, "clip of the values, 0 = none", range="[0, inf)")
    value_coef: float = option(0.1, "c, weight of the value loss", range="[0, inf)")
    ema: float = option(
        0.992, "decay per update of the weights' average, 0 = none", paper="0.992", range="[0, 1)"
    )
    export_ema: bool = option(False, "final/ is the averaged policy", paper="yes")

    pretrain_data: tuple[str, ...] = option((), "text for the pre-training mix (PPO-ptx)")
    ptx_coef: float = option(  # at 1 its gradient drowns the policy's in a model of this size
        0.03, "weight of its loss per token", paper="27.8", range="[0, inf)"
    )
    ptx_batch: int = option(
        8, "its windows per update", unit="sequences", paper="512", range="[1, inf)"
    )
    ptx_context: int = option(
        128, "length of a window", unit="tokens", paper="2048", range="[2, inf)"
    )
    strict: bool = option(False, "stop if generator and trainer differ in a log-prob's last bit")
    critic_lr: float = option(3e-4, "the critic's lr", paper="9e-6", range="(0, inf)")
    optim: OptimConfig = group(
        OptimConfig,
        lr=1e-4,
        schedule="constant",
        warmup=10,
        eps=1e-5,
        weight_decay=0.0,
        paper={
            "lr": "2.55e-6 to 2.55e-5",
            "schedule": "constant",
            "warmup": "10 iterations",
            "warmup_from": "0.1",
        },
    )
    guard: GuardConfig = group(GuardConfig)
    run: RunConfig = group(RunConfig, save_every=10, log_every=1)
    given: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        check_options(self)
        self._apply_preset()
        check(bool(self.init), "--init is missing: the checkpoint to begin with")
        check(bool(self.prompts), "--prompts is missing: files of prompts")
        unseen = "PPO never sees the rule that judges it; name a reward model or module:function"
        check(self.reward != "gold", f"--reward gold: {unseen}")
        check_divides(self.minibatch, self.batch, ("minibatch", "batch"))
        if self.micro_batch:
            check_divides(self.micro_batch, self.minibatch, ("micro-batch", "minibatch"))
        check_divides(self.group_size, self.batch, ("group-size", "batch"))
        if self.algorithm != "ppo":
            name = f"--algorithm {self.algorithm}"
            check(self.group_size > 1, f"{name} needs --group-size above 1, got {self.group_size}")
            check(self.truncated != "bootstrap", f"{name} has no critic: --truncated zero or drop")
            check(not self.whiten_rewards, f"{name} has no rewards per token: --no-whiten-rewards")
        dual = self.dual_clip
        check(dual == 0 or dual > 1, f"--dual-clip must be 0 (none) or above 1, got {dual}")
        check(self.ema > 0 or not self.export_ema, "--export-ema needs --ema above 0")

    @property
    def _table(self) -> Table:
        return PRESETS[self.preset] | ALGORITHMS[self.algorithm]

    def _apply_preset(self) -> None:
        defaults = {item.name: item.default for item in options(type(self))}
        now, unknown = flatten(self), [name for name in self.given if name not in defaults]
        check(not unknown, f"given must name settings, got {', '.join(unknown)}")
        stands = {n for n in self._table if n in self.given or now[n] != defaults[n]}
        new = {n: value for n, (value, _) in self._table.items() if n not in stands}
        optim = {n: new.pop(n) for n in flatten(self.optim) if n in new}
        for name, value in (new | {"optim": replace(self.optim, **optim)}).items():
            object.__setattr__(self, name, value)

    def sources(self) -> Table:
        """Every value that no flag sets, with its source: preset, algorithm or our choice."""
        found, now, table = {}, flatten(self), self._table
        about = {"preset", "algorithm", *flatten(self.run), *self.given}
        for item in options(type(self)):
            name, value = item.name, now[item.name]
            if name in about or item.many or item.metadata.get("required"):
                continue
            if name in table and value == table[name][0]:
                found[name] = table[name]
            elif value == item.default:
                found[name] = value, OUR_CHOICE
        return found


# ---- The formulas that no kernel computes


def adaptive_kl_coef(config: PPOConfig, kl_coef: float, kl: float) -> float:
    """β (1 + clip(KL / target − 1, ±0.2) · n / horizon), n episodes. Ziegler et al. 2019, §2.2."""
    error = min(max(kl / config.kl_target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * config.batch / config.kl_horizon)


def penalise_missing_eos(scores: Tensor, ended: Tensor, form: str, penalty: float) -> Tensor:
    """A response without end scores score − penalty ("subtract") or −penalty ("replace")."""
    if form == "none":
        return scores
    worse = scores - penalty if form == "subtract" else torch.full_like(scores, -penalty)
    return torch.where(ended, scores, worse)


def group_advantages(rewards: Tensor, size: int, algorithm: str) -> Tensor:
    """A (B,) of responses with reward r (B,), of which every `size` in turn answer one prompt.

    grpo: (r − mean) / (std + 1e-4), std with size − 1; dr_grpo: r − mean; rloo: r − the mean of the
    others' r. Over the group each. The 1e-4 is TRL's; Shao et al. have none.
    """
    groups = rewards.view(-1, size)
    centred = groups - groups.mean(1, keepdim=True)
    if algorithm == "grpo":
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    elif algorithm == "rloo":
        centred = centred * (size / (size - 1))
    return centred.flatten()


@torch.no_grad()
def update_average(average: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """average ← decay · average + (1 − decay) · weights, in place."""
    torch._foreach_lerp_(list(average), list(weights), 1.0 - decay)


# ---- The two models


def state_values(critic: GPT, part: Episodes) -> Tensor:
    """V (N,) of every state: at position p, before token p + 1 is chosen."""
    return critic.scores(critic.hidden(part.tokens, part.cu_seqlens, max_seqlen=part.max_seqlen))


def response_logprobs(
    model: GPT, part: Episodes, temperature: float, entropy: bool = False
) -> ops.TokenLogprobs:
    """Log-probabilities (N,) of the responses' tokens, 0 elsewhere, of one forward."""
    hidden = model.hidden(part.tokens, part.cu_seqlens, max_seqlen=part.max_seqlen)
    return ops.linear_token_logprobs(
        hidden, model.head_weight, part.targets, temperature=temperature, entropy=entropy
    )


# ---- One iteration


class PPO:
    """Policy, critic (of `ppo` alone), reference and judge, and what one iteration does with them.

    All that iteration `step` draws depends on `step` and the seed alone.
    """

    def __init__(
        self,
        config: PPOConfig,
        policy: GPT,
        critic: GPT | None,
        reference: GPT,
        judge: Judge,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        text: TokenStream | None = None,
    ) -> None:
        self.config, self.seed = config, config.run.seed
        # Dropout is off in all models: a log-ratio must compare weights, not noise.
        self.policy, self.critic = policy.eval(), critic.eval() if critic is not None else None
        self.reference = reference.eval().requires_grad_(False)
        self.judge, self.tokenizer, self.text = judge, tokenizer, text
        self.prompts, self.prompt_order = prompts, EpochOrder(len(prompts), self.seed)
        self.device = policy.embed.device
        self.micro_batch = parallel.micro_batch_size(
            config.micro_batch, config.minibatch, "minibatch"
        )
        models, self.optims = {"": policy}, {"": config.optim}
        if critic is not None:
            models["critic"] = critic
            self.optims["critic"] = replace(config.optim, lr=config.critic_lr)
        optimizers = {name: AdamW(models[name], o) for name, o in self.optims.items()}
        averaged = policy.named_parameters() if config.ema else ()
        average = {f"ema.{name}": p.detach().clone() for name, p in averaged}
        extra = {"kl_coef": config.kl_coef, "skipped_updates": 0}
        self.state = TrainState(models, optimizers, tokenizer, average, extra)

    def iteration(self, step: int) -> Metrics:
        """Rollouts, rewards and advantages, then the updates; returns the metrics."""
        config, extra = self.config, self.state.extra
        samples = self.rollout(step)
        scores = self.score(samples)
        episodes = Episodes.of(samples, self.device)
        orders = [self.order(step, epoch) for epoch in range(config.inner_epochs)]
        metrics = self.assess(episodes, orders[0])
        metrics |= self.estimate(episodes, samples, scores)
        minibatches = [rows for order in orders for rows in pieces(order, config.minibatch)]
        updates = [
            self.update(step, step * len(minibatches) + i, episodes, rows)
            for i, rows in enumerate(minibatches)
        ]
        metrics |= summarise(updates) | {
            "kl_coef": extra["kl_coef"],
            "skipped_updates": extra["skipped_updates"],
            "lr": learning_rate(config.optim, step, config.steps),
            "tokens": episodes.starts[-1],
        }
        if config.kl_target:
            extra["kl_coef"] = adaptive_kl_coef(config, extra["kl_coef"], metrics["objective/kl"])
        return metrics

    def rollout(self, step: int) -> list[Sample]:
        """The iteration's prompts, each with its responses, from the whole distribution."""
        config = self.config
        indices = self.prompt_order.batch(step, config.batch // config.group_size)
        prompts, seed = [self.prompts[i] for i in indices], mix(self.seed, step, SAMPLING)
        params = SamplingParams(
            config.max_tokens, config.temperature, n=config.group_size, seed=seed
        )
        return sample_responses(self.policy, self.tokenizer, prompts, params, marked=True)

    def score(self, samples: Sequence[Sample]) -> Tensor:
        """The judge's scores (B,); one that is not finite stops the run before it does harm."""
        scores = score_samples(self.judge, samples)
        for sample, value in zip(samples, scores, strict=True):
            check(
                math.isfinite(value),
                f"a reward must be finite, got {value} for the response "
                f"{sample.completion.text!r} to {sample.prompt.text!r}",
            )
        return torch.tensor(scores, dtype=torch.float32, device=self.device)

    def order(self, step: int, epoch: int) -> list[int]:
        """A fresh permutation of the episodes for every inner epoch."""
        generator = torch.Generator().manual_seed(mix(self.seed, step, SHUFFLE, epoch))
        return torch.randperm(self.config.batch, generator=generator).tolist()

    @torch.no_grad()
    def assess(self, episodes: Episodes, order: Sequence[int]) -> Metrics:
        """Reference log-probs and values, on the very micro-batches of the first epoch.

        On a GPU, to be strict, or to correct for the generator, old log-probs too; then the metrics
        say how far off those of the generator were. The correction is truncated importance
        sampling: min(π / generator's π, cap) (Yao et al. 2025, "TIS").
        """
        config = self.config
        again = config.strict or config.importance_cap > 0 or self.device.type == "cuda"
        drawn = episodes.old_logprobs.clone()

        def measure(rows: Sequence[int]) -> dict[str, Tensor]:
            part = episodes.take(rows)
            ref = response_logprobs(self.reference, part, config.temperature)
            found = {"ref_logprobs": ref.logprobs}
            if self.critic is not None:
                found["values"] = state_values(self.critic, part)
            if again:
                old = response_logprobs(self.policy, part, config.temperature)
                found["old_logprobs"] = old.logprobs
            return {name: parallel.portable(tensor) for name, tensor in found.items()}

        with contextlib.ExitStack() as stack:
            for model in (self.policy, self.reference, self.critic):
                if model is not None:
                    stack.enter_context(model.frozen())
            parts = list(pieces(order, self.micro_batch))
            for rows, found in zip(parts, parallel.everywhere(measure, parts), strict=True):
                episodes.put(rows, found)
        if config.strict:
            check_same(episodes, drawn)
        if not again:
            return {}
        off = episodes.old_logprobs - drawn
        if config.importance_cap:
            episodes.weights = off.exp().clamp(max=config.importance_cap)
        return {"ppo/logprob_mismatch": float(off.abs().max())}

    @torch.no_grad()
    def estimate(self, episodes: Episodes, samples: Sequence[Sample], scores: Tensor) -> Metrics:
        """Fills in advantages and returns; the rollouts' metrics, named as the papers do."""
        config, batch, mask = self.config, len(samples), episodes.mask
        ended = torch.tensor([s.ended for s in samples], device=self.device)
        old, ref = episodes.old_logprobs[mask], episodes.ref_logprobs[mask]
        metrics = {
            "objective/score": float(scores.mean()),
            "objective/kl": float((old - ref).sum()) / batch,
            "objective/entropy": float(-old.sum()) / batch,
            "rollout/eos_rate": float(ended.float().mean()),
            "rollout/length": float(mask.sum()) / batch,
        }
        scores = penalise_missing_eos(scores, ended, config.missing_eos, config.missing_eos_penalty)
        kl_coef = self.state.extra["kl_coef"] if config.kl_in == "reward" else 0.0
        if config.algorithm != "ppo":
            if config.reward_clip:
                scores = scores.clamp(-config.reward_clip, config.reward_clip)
            kl = episodes.sums(episodes.old_logprobs - episodes.ref_logprobs)
            rewards = scores - kl_coef * kl
            of_responses = group_advantages(rewards, config.group_size, config.algorithm)
            episodes.advantages = torch.where(mask, episodes.spread(of_responses), 0)
            metrics["objective/reward"] = float(rewards.mean())
        if config.truncated == "drop":
            episodes.mask = mask & episodes.spread(ended)
        episodes.states = episodes.mask.clone()
        if config.algorithm == "ppo":
            rewards = self.estimate_per_token(episodes, ended, scores, kl_coef)
            metrics["objective/reward"] = float(rewards.sum()) / batch
        return metrics

    def estimate_per_token(
        self, episodes: Episodes, ended: Tensor, scores: Tensor, kl_coef: float
    ) -> Tensor:
        """PPO's: GAE of rewards (N,), which it returns; advantages whitened."""
        config, ends = self.config, episodes.cu_seqlens[1:].long() - 1
        after_end = config.score_at == "after_end"
        if after_end:
            episodes.states[ends[ended]] = True
        targets = ops.ppo_advantage(
            scores,
            episodes.old_logprobs,
            episodes.ref_logprobs,
            episodes.values,
            episodes.states,
            kl_coef=kl_coef,
            gamma=config.gamma,
            lambda_=config.lambda_,
            cu_seqlens=episodes.cu_seqlens,
            bootstrap=episodes.values[ends] * ~ended if config.truncated == "bootstrap" else None,
            reward_clip=config.reward_clip or None,
            whiten_rewards=config.whiten_rewards,
            whiten=not after_end,
        )
        episodes.advantages, episodes.returns = targets.advantages, targets.returns
        if after_end:  # no token is chosen after the end: that state has no advantage
            kept = targets.advantages[episodes.mask]
            moments = kept.mean(), kept.var(correction=0)
            episodes.advantages = ops.whiten_advantages(targets.advantages, episodes.mask, *moments)
        return targets.rewards

    def normalizer(self, minibatch: Episodes) -> Tensor | float:
        """What the sum of a whole minibatch's losses is divided by; its micro-batches share it."""
        if self.config.aggregate == "constant":
            return float(self.config.minibatch * self.config.max_tokens)
        tokens = minibatch.sums(torch.ones_like(minibatch.advantages))
        counted = tokens if self.config.aggregate == "token" else tokens > 0
        return counted.sum()

    def loss(self, part: Episodes, normalizer: Tensor | float) -> tuple[Tensor, ops.PPOStats]:
        """The loss of a micro-batch."""
        config, in_loss = self.config, self.config.kl_in == "loss"
        fitted = {}
        if self.critic is not None:
            fitted = {"values": state_values(self.critic, part), "old_values": part.values}
            fitted |= {"returns": part.returns}
        new = response_logprobs(self.policy, part, config.temperature, entropy=True)
        return ops.ppo_loss(
            new.logprobs,
            part.old_logprobs,
            part.advantages,
            part.states,
            **fitted,
            entropy=new.entropy.detach(),
            ref_logprobs=part.ref_logprobs if in_loss else None,
            weights=part.weights if config.importance_cap else None,
            cu_seqlens=part.cu_seqlens,
            clip_range=config.clip_range,
            clip_range_high=config.clip_range_high or None,
            dual_clip=config.dual_clip or None,
            value_clip_range=config.value_clip_range or None,
            value_coef=config.value_coef,
            kl_coef=self.state.extra["kl_coef"] if in_loss else 0.0,
            aggregate=config.aggregate,
            normalizer=normalizer,
        )

    def pretrain_losses(self, number: int) -> Iterator[Tensor]:
        """The pre-training loss of update `number` in parts, whose sum is the mean per token."""
        config, seed = self.config, mix(self.seed, PRETRAIN)
        packed = self.text.batch(number, seed, config.ptx_batch, config.ptx_context)
        count = count_targets(packed)
        windows = -(-config.ptx_batch * self.micro_batch // config.minibatch)
        for part in parallel.share(micro_batches(packed, windows * config.ptx_context)):
            yield next_token_loss(self.policy, to_device(part, self.device), count)

    def update(
        self, step: int, number: int, episodes: Episodes, rows: Sequence[int]
    ) -> tuple[Metrics, Tensor]:
        """One step of both optimisers on a minibatch; `number` counts updates from the run's start.

        Returns its metrics and the sums of ops.PPOStats.
        """
        config = self.config
        normalizer = self.normalizer(episodes.take(rows))
        total, ptx = torch.zeros(2, device=self.device).unbind()
        sums = 0.0
        for micro in parallel.share(pieces(rows, self.micro_batch)):
            loss, stats = self.loss(episodes.take(micro), normalizer)
            loss.backward()
            total, sums = total + loss.detach(), sums + stats.sums
        if self.text is not None:  # PPO-ptx: a backward of its own, its gradients join PPO's
            for loss in self.pretrain_losses(number):
                (config.ptx_coef * loss).backward()
                ptx = ptx + loss.detach()
        total, ptx, sums = map(parallel.total, (total, ptx, sums))
        norms = {
            name: apply_gradients(
                self.state.optimizers[name], learning_rate(o, step, config.steps), o.grad_clip
            )
            for name, o in self.optims.items()
        }
        self.state.extra["skipped_updates"] += not all(map(math.isfinite, norms.values()))
        if config.ema:
            update_average(self.state.tensors.values(), self.policy.parameters(), config.ema)
        metrics = {"loss": float(total + config.ptx_coef * ptx), "ppo/grad_norm": norms[""]}
        if "critic" in norms:
            metrics["ppo/critic_grad_norm"] = norms["critic"]
        return metrics | ({"ptx/loss": float(ptx)} if self.text is not None else {}), sums

    @torch.no_grad()
    def export_average(self) -> None:
        """Puts the averaged weights in the policy's place; the last ones stay in the state."""
        for name, parameter in self.policy.named_parameters():
            average = self.state.tensors.pop(f"ema.{name}")
            self.state.tensors[f"last.{name}"] = parameter.detach().clone()
            parameter.copy_(average)


def summarise(updates: Sequence[tuple[Metrics, Tensor]]) -> Metrics:
    """Means over an iteration's updates, and over the tokens in them."""
    figures = [metrics for metrics, _ in updates]
    metrics = {name: sum(f[name] for f in figures) / len(figures) for name in figures[0]}
    means = ops.PPOStats(sum(sums for _, sums in updates)).means()
    names = {name: name for name in ("policy_loss", "approx_kl", "ratio", "entropy")}
    names["clip_fraction"] = "clipped"
    if "ppo/critic_grad_norm" in metrics:
        names |= {name: name for name in ("value_loss", "explained_variance")}
        names["value_clip_fraction"] = "value_clipped"
    return metrics | {f"ppo/{ours}": means[theirs] for ours, theirs in names.items()}


# ---- The stage


def run(config: PPOConfig, reward: RewardFunction | None = None) -> Path:
    """Runs the stage; returns the final checkpoint. `reward` may stand in for `config.reward`."""
    check(bool(config.reward or reward), "--reward is missing: a reward model or module:function")
    run = Run.open("ppo", config)
    if run.finished:
        return run.final
    path = resolve_checkpoint(config.init, "sft")
    tokenizer = Tokenizer.load(path)
    policy, reference = (load(path, dtype=run.dtype, device=run.device) for _ in range(2))
    check(policy.head == "lm", f"--init {path} is a reward model: it cannot write responses")
    check(
        tokenizer.eos_id is not None and tokenizer.assistant_id is not None,
        f"--init {path} does not know where a response begins and ends: run sft on it first",
    )
    judge = make_judge(reward or config.reward, tokenizer, run.device, run.dtype)
    critic: GPT | None = None
    context = policy.config.context
    if config.algorithm == "ppo":
        critic = make_critic(judge, policy, mix(config.run.seed, CRITIC))
        context = min(context, critic.config.context)
    prompts, text = read_fitting_prompts(config, tokenizer, context), None
    guard = Guard(config, run, tokenizer, prompts)
    if config.pretrain_data:
        room = policy.config.context
        found = f"got {config.ptx_context}"
        check(config.ptx_context <= room, f"--ptx-context must fit the context {room}, {found}")
        where, window = run.directory / "tokens", config.ptx_context
        text, _ = TokenStream.build(config.pretrain_data, tokenizer, where, HELD_OUT, window=window)
    if (config.preset, config.algorithm) != ("small", "ppo"):
        for name, (value, source) in config.sources().items():
            print(f"ppo: preset {config.preset}: {name} {value} ({source})")
    ppo = PPO(config, policy, critic, reference, judge, tokenizer, prompts, text)
    run.start(ppo.state, config.steps)
    guard.begin(ppo)
    run.loop(
        guard.iteration,
        evaluate=guard.evaluate if config.guard.guard_reward else None,
        eval_every=config.guard.guard_every,
        eval_first=True,
        show=("objective/score", "objective/kl"),
    )
    guard.restore()
    if config.export_ema:
        ppo.export_average()
    final = run.finish()
    page = parallel.first(lambda: report.write_ppo(run.directory))
    print(f"ppo: wrote {page}", flush=True)
    return final


def make_critic(judge: Judge, policy: GPT, seed: int) -> GPT:
    """The reward model's copy, if it reads the same tokens; else the policy under a new head."""
    if isinstance(judge, ModelJudge) and judge.same_tokens:
        return copy.deepcopy(judge.model).requires_grad_(True)
    return policy.to_scalar_head(torch.Generator().manual_seed(seed))


def read_fitting_prompts(config: PPOConfig, tokenizer: Tokenizer, context: int) -> list[Prompt]:
    """The prompts that leave room for a response; an error if more than a fifth do not."""
    prompts, room = read_prompts(config.prompts), context - config.max_tokens
    fitting = [p for p in prompts if len(tokenizer.prompt_ids(p.text)) <= room]
    what = f"prompts with {config.max_tokens} more tokens of response"
    remedy = "shorten them, or lower --max-tokens"
    report_dropped(len(prompts) - len(fitting), len(prompts), what, context, remedy)
    return fitting
