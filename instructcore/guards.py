"""Guard rails of PPO: samples as training goes, and alarms for what goes wrong as the reward rises.

A signal's mean over the last iterations is compared with that over the run's first, when the policy
was the SFT model but for a few warm-up updates. Its level is the share of the threshold used up;
the alarm is raised at 1. With n = guard_window, 0 marking the first n iterations:

    kl       KL / (guard_kl · H0)                         H0: −Σ_t log π per response, nats
    length   |log(L / L0)| / log(guard_length)            L: tokens per response
    eos      (E0 − E) / guard_eos                         E: share of responses that end themselves
    entropy  log(h0 / h) / log(1 / guard_entropy)         h: entropy per token, nats
    score    mean(best − now) / (guard_drop · its standard error), over held-out prompts

The defaults and their reasons, which are ours:

    guard_kl 0.5       a policy that has one typical answer left has the KL H0: this is half way
    guard_length 2     rewards for mere length double it soon; an honest change of style rarely does
    guard_eos 0.2      one response in five is cut off that would have ended before
    guard_entropy 0.25 a quarter of the choices left: too few to explore with
    guard_drop 2.5     standard errors, not 2, since every evaluation is one more chance of an alarm
    guard_every 2      a policy that games its reward can lose a tenth of what it was worth in 6
    guard_window 5     within the default warm-up of 10; five batches even out a single odd one

The held-out score is that of a judge that is not optimised (a second reward model, or a function)
on greedy answers to prompts that are not trained on, the more the better: the standard error is
theirs. Where it falls while the reward still rises, the reward model is over-optimised (Gao et al.
2022, arXiv:2210.10760). `bench/overoptimisation.py` tries the defaults.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from . import parallel
from .config import check, check_options, option
from .data import Prompt, read_jsonl, read_prompts
from .evaluate import Sample, make_judge, sample_responses, score_samples
from .generate import SamplingParams
from .tokenizer import Tokenizer
from .train import Metrics, Run, write_whole

if TYPE_CHECKING:
    from .ppo import PPO, PPOConfig

SHOWN = 8  # prompts in samples.jsonl
TINY = 1e-9
SIGNALS = {  # the metrics they are read from
    "kl": "objective/kl",
    "length": "rollout/length",
    "eos": "rollout/eos_rate",
    "entropy": "ppo/entropy",
    "surprise": "objective/entropy",  # H0; no alarm of its own
}


@dataclass(frozen=True)
class GuardConfig:
    """Alarms while PPO runs; a threshold of 0 turns its alarm off."""

    guard: str = option(
        "warn",
        "what an alarm does; stop: save, and make final/ the best so far",
        choices=("warn", "stop"),
    )
    guard_window: int = option(
        5, "means over the last so many, against the first", unit="iterations", range="[1, inf)"
    )
    guard_kl: float = option(
        0.5, "most KL", unit="share of the first entropy per response", range="[0, inf)"
    )
    guard_length: float = option(2.0, "most change of the length, as a factor", range="[0, inf)")
    guard_eos: float = option(
        0.2, "most fall of the share of responses that end", unit="share", range="[0, 1]"
    )
    guard_entropy: float = option(
        0.25, "least entropy per token", unit="share of the first", range="[0, 1)"
    )
    guard_reward: str = option("", "second judge, not optimised: a reward model, module:function")
    guard_every: int = option(
        2,
        "time between its scores; without it, between saves of the best",
        unit="iterations",
        range="[1, inf)",
    )
    guard_drop: float = option(
        2.5, "most fall of its score from the best", unit="standard errors", range="[0, inf)"
    )
    held_out: tuple[str, ...] = option(
        (), "prompts not trained on, for --guard-reward and samples.jsonl", metavar="FILE"
    )

    def __post_init__(self) -> None:
        check_options(self)
        factor = self.guard_length
        check(factor == 0 or factor > 1, f"--guard-length must be 0 or above 1, got {factor}")
        check(bool(self.held_out) or not self.guard_reward, "--guard-reward needs --held-out")


class Alarms:
    """What the signals have been and which alarms are raised.

    `memory` is all that must survive a resumed run, as JSON: `recent` and `first` signals, the
    steps of the first `alarms`, the `best` held-out scores.
    """

    def __init__(self, config: GuardConfig, memory: dict[str, Any]) -> None:
        self.config, self.memory = config, memory
        for name in ("recent", "first", "alarms", "best"):
            memory.setdefault(name, {})

    def observe(self, step: int, metrics: Metrics) -> dict[str, float]:
        """The levels after an iteration, by signal; none within the first ones."""
        config, recent, first = self.config, self.memory["recent"], self.memory["first"]
        for name, metric in SIGNALS.items():
            recent[name] = [*recent.get(name, []), float(metrics[metric])][-config.guard_window :]
        now = {name: fmean(values) for name, values in recent.items()}
        if not first:
            if len(recent["kl"]) == config.guard_window:
                first.update(now)
            return {}
        levels: dict[str, float] = {}
        if limit := config.guard_kl:
            levels["kl"] = now["kl"] / (limit * max(first["surprise"], 1.0))
        if limit := config.guard_length:
            levels["length"] = abs(_log_ratio(now["length"], first["length"])) / math.log(limit)
        if limit := config.guard_eos:
            levels["eos"] = (first["eos"] - now["eos"]) / limit
        if limit := config.guard_entropy:
            levels["entropy"] = _log_ratio(first["entropy"], now["entropy"]) / -math.log(limit)
        for name, level in levels.items():
            text = f"{SIGNALS[name]} is {now[name]:.4g}, in the first {first[name]:.4g}"
            self._raise(step, name, level, text)
        return levels

    def compare(self, step: int, scores: Sequence[float]) -> tuple[float, bool]:
        """(the level of the held-out scores' fall from the best, whether they are the new best)"""
        best = self.memory["best"]
        if not best or fmean(scores) > fmean(best["scores"]):
            best.update(step=step, scores=list(scores))
            return 0.0, True
        falls = [old - new for old, new in zip(best["scores"], scores, strict=True)]
        allowed = self.config.guard_drop * stdev(falls) / math.sqrt(len(falls))
        level = fmean(falls) / max(allowed, TINY) if self.config.guard_drop else 0.0
        was = f"{fmean(best['scores']):.4g} after step {best['step']}"
        self._raise(step, "score", level, f"the held-out score is {fmean(scores):.4g}, was {was}")
        return level, False

    def _raise(self, step: int, name: str, level: float, text: str) -> None:
        """Notes the step of an alarm and says so, once for each signal."""
        if level >= 1 and name not in self.memory["alarms"]:
            self.memory["alarms"][name] = step
            flag = "drop" if name == "score" else name
            limit = f"--guard-{flag} {getattr(self.config, f'guard_{flag}'):g}"
            print(f"ppo: ALARM after step {step}: {text} ({limit})", flush=True)


def _log_ratio(a: float, b: float) -> float:
    return math.log(max(a, TINY) / max(b, TINY))


class Guard:
    """What goes on around the iterations of a run. Use: begin, iteration and evaluate, restore."""

    def __init__(
        self, config: PPOConfig, run: Run, tokenizer: Tokenizer, prompts: Sequence[Prompt]
    ) -> None:
        self.config, self.run, self.stops = config.guard, run, config.guard.guard == "stop"
        self.params = SamplingParams(config.max_tokens, temperature=0.0)
        self.held_out = read_prompts(self.config.held_out) if self.config.held_out else []
        trained = {prompt.text for prompt in prompts}
        seen = sum(prompt.text in trained for prompt in self.held_out)
        check(not seen, f"--held-out: {seen} of its {len(self.held_out)} prompts are in --prompts")
        self.shown = (self.held_out or prompts)[:SHOWN]
        self.judge = None
        if name := self.config.guard_reward:
            check(len(self.held_out) > 1, "--held-out must have at least 2 prompts, got 1")
            self.judge = make_judge(name, tokenizer, run.device, run.dtype)
        self.best = run.directory / "best"

    def begin(self, ppo: PPO) -> None:
        """Takes up what a resumed run remembers; a run that an alarm has stopped stays stopped."""
        self.ppo, memory = ppo, ppo.state.extra.setdefault("guard", {})
        self.alarms = Alarms(self.config, memory)
        if self.stops and memory["alarms"]:
            self.run.stop()

    def iteration(self, step: int) -> Metrics:
        """PPO's iteration, with samples before the first and after every checkpoint's."""
        if step == 0:
            self._write_samples(0)
        metrics, done = self.ppo.iteration(step), step + 1
        levels = self.alarms.observe(done, metrics)
        raised = self.alarms.memory["alarms"]
        every, steps = self.run.config.save_every, self.run.steps
        first = done == self.config.guard_window
        if self.stops and self.judge is None and not raised:
            if first or (done > self.config.guard_window and done % self.config.guard_every == 0):
                self._save_best(done)
        if done == steps or (every and done % every == 0):
            self._write_samples(done)
        self._stop_if(raised)
        levels = {f"guard/{name}": level for name, level in levels.items()}
        return metrics | levels | {"guard/alarms": len(raised)}

    def evaluate(self) -> Metrics:
        """The second judge's score of the held-out prompts, after `run.step` iterations."""
        scores = score_samples(self.judge, self._answer(self.held_out))
        check(all(map(math.isfinite, scores)), "the scores of --guard-reward must be finite")
        level, is_best = self.alarms.compare(self.run.step, scores)
        if is_best and self.stops:
            self._save_best(self.run.step)
        self._stop_if(self.alarms.memory["alarms"])
        return {"guard/held_out": fmean(scores), "guard/score": level}

    def restore(self) -> None:
        """After an alarm that stopped the run: the best checkpoint's state replaces the last."""
        raised = self.alarms.memory["alarms"]
        if not (self.stops and raised):
            return
        last, trainer = self.run.step, self.ppo.state.load(self.best)
        self.ppo.state.extra["guard"]["alarms"] = raised
        self.run.step = trainer["step"]
        what = "of the highest held-out score" if self.judge else "from before the alarm"
        reasons = ", ".join(raised)
        print(f"ppo: stopped after step {last} ({reasons}); final/ is step {self.run.step}, {what}")

    def _stop_if(self, raised: dict[str, int]) -> None:
        if self.stops and raised:
            self.run.stop()

    def _save_best(self, done: int) -> None:
        self.ppo.state.save(self.best, "ppo", done, self.run.steps)

    def _answer(self, prompts: Sequence[Prompt]) -> list[Sample]:
        ppo = self.ppo
        return sample_responses(ppo.policy, ppo.tokenizer, prompts, self.params, marked=True)

    def _write_samples(self, done: int) -> None:
        """Greedy answers after `done` iterations, in place of those of a run cut short."""
        samples = self._answer(self.shown)
        scores = score_samples(self.ppo.judge, samples)
        parallel.first(lambda: self._replace_samples(done, samples, scores))

    def _replace_samples(self, done: int, samples: list[Sample], scores: list[float]) -> None:
        path = self.run.directory / "samples.jsonl"
        rows = read_jsonl(path) if path.exists() else []
        rows = [row for row in rows if row["step"] < done]
        for sample, score in zip(samples, scores, strict=True):
            row = {"step": done, "prompt": sample.prompt.text, "response": sample.completion.text}
            row |= {"score": score, "ended": sample.ended, "held_out": bool(self.held_out)}
            rows.append(row)
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
