"""PPO: formulas by hand, exactness before the first update, invariances, whole small runs."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerance import assert_same_bits
from toy_data import command_line

from instructcore import cli
from instructcore import ppo as ppo_module
from instructcore.config import OptimConfig, RunConfig, flatten, unflatten
from instructcore.data import Prompt, TokenStream
from instructcore.errors import UserError
from instructcore.evaluate import Sample, make_judge
from instructcore.generate import Completion
from instructcore.model import GPT, ModelConfig
from instructcore.ppo import PPO, Episodes, PPOConfig
from instructcore.presets import ALGORITHMS, OUR_CHOICE, PRESETS
from instructcore.tokenizer import Tokenizer
from instructcore.train import WALL_CLOCK, learning_rate

TOKENIZER = Tokenizer.bytes()
EOS = TOKENIZER.eos_id


def model(family: str = "llama", seed: int = 0, **shape) -> GPT:
    shape = {"context": 48, "layers": 1, "heads": 2, "width": 16} | shape
    config = ModelConfig(family=family, vocab_size=TOKENIZER.vocab_size, **shape)
    return GPT(config, generator=torch.Generator().manual_seed(seed))


def settings(**changes) -> PPOConfig:
    optim = OptimConfig(lr=1e-2, schedule="constant", warmup=2, eps=1e-5, weight_decay=0.0)
    small = dict(batch=8, minibatch=4, max_tokens=6, steps=4, critic_lr=1e-2, optim=optim)
    paths = dict(init="init", reward="module:function", prompts=("prompts",))
    return PPOConfig(**paths | small | changes)


def letters(prompts: list[str], responses: list[str], records: list[dict]) -> list[float]:
    """How many of the first bytes' letters are there: a reward that a random model can raise."""
    return [sum(c in "abcdefgh" for c in response) / 2 for response in responses]


def prompts(count: int = 12) -> list[Prompt]:
    return [Prompt("say " + "x" * (i % 5) + str(i), {"number": i}) for i in range(count)]


def make(config: PPOConfig, *, family: str = "llama", text: TokenStream | None = None, **shape):
    policy, reference = model(family, **shape), model(family, **shape)
    judge = make_judge(letters, TOKENIZER, torch.device("cpu"), torch.float32)
    critic = policy.to_scalar_head(torch.Generator().manual_seed(1))
    critic = critic if config.algorithm == "ppo" else None
    return PPO(config, policy, critic, reference, judge, TOKENIZER, prompts(), text)


def sample(prompt: list[int], response: list[int], logprobs: list[float] | None = None) -> Sample:
    logprobs = logprobs or [0.0] * len(response)
    reason = "stop" if response[-1] == EOS else "length"
    text = TOKENIZER.decode(response)
    completion = Completion(response, logprobs, logprobs, reason, text)
    return Sample(Prompt(TOKENIZER.decode(prompt), {}), prompt, completion)


def random_samples(count: int, seed: int = 0) -> list[Sample]:
    """Of unequal lengths, half of them with an end, none without a response."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count, 2), generator=g).tolist()
    rows = [torch.randint(0, 256, (sum(n),), generator=g).tolist() for n in lengths]
    ends = [[EOS] if i % 2 else [] for i in range(count)]
    return [
        sample(row[:p], row[p:] + end) for row, (p, _), end in zip(rows, lengths, ends, strict=True)
    ]


def random_episodes(ppo: PPO, seed: int = 0) -> Episodes:
    """An iteration's episodes after `assess` and `estimate`, off policy: ratios differ from 1."""
    samples = random_samples(ppo.config.batch, seed)
    episodes = Episodes.of(samples, torch.device("cpu"))
    with torch.no_grad():
        episodes.old_logprobs = ppo_module.response_logprobs(ppo.policy, episodes, 1.0).logprobs
    ppo.assess(episodes, range(ppo.config.batch))
    g = torch.Generator().manual_seed(seed)
    noise = 0.3 * torch.randn(episodes.mask.shape, generator=g)
    episodes.old_logprobs = (episodes.old_logprobs + noise * episodes.mask).clamp(max=0)
    scores = torch.randn(ppo.config.batch, generator=g)
    ppo.estimate(episodes, samples, scores)
    return episodes


def gradients(*models: GPT) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for m in models if m is not None for p in m.parameters()])


def clear(*models: GPT) -> None:
    for m in models:
        m.zero_grad(set_to_none=True)


@pytest.fixture
def text(tmp_path) -> TokenStream:
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": "hello there, text number " * (1 + i % 3)}) for i in range(30)]
    path.write_text("\n".join(lines))
    return TokenStream.build([path], TOKENIZER, tmp_path / "tokens", 0.1)[0]


# ---- The formulas, by hand


@pytest.mark.checklist(10)
def test_adaptive_kl_coefficient():
    config = settings(kl_target=6.0, batch=128)
    # Within ±20 % the error counts as it is, beyond that as 20 %.
    assert ppo_module.adaptive_kl_coef(config, 0.1, 6.6) == pytest.approx(0.1 * (1 + 0.1 * 0.0128))
    assert ppo_module.adaptive_kl_coef(config, 0.1, 60.0) == pytest.approx(0.1 * (1 + 0.2 * 0.0128))
    assert ppo_module.adaptive_kl_coef(config, 0.1, 0.0) == pytest.approx(0.1 * (1 - 0.2 * 0.0128))


@pytest.mark.checklist(6)
@pytest.mark.bug("safe-rlhf#71")
def test_missing_eos_in_both_forms():
    scores, ended = torch.tensor([2.0, 3.0]), torch.tensor([True, False])
    penalise = ppo_module.penalise_missing_eos
    assert penalise(scores, ended, "subtract", 1.5).tolist() == [2.0, 1.5]
    assert penalise(scores, ended, "replace", 1.0).tolist() == [2.0, -1.0]
    assert penalise(scores, ended, "none", 1.0).tolist() == [2.0, 3.0]


def test_average_of_weights():
    average, weights = [torch.tensor([1.0, 0.0])], [torch.tensor([3.0, 1.0])]
    ppo_module.update_average(average, weights, 0.75)
    assert average[0].tolist() == [1.5, 0.25]


@pytest.mark.checklist(3)
def test_layout():
    """Position p predicts token p + 1: a response's mask begins at the prompt's last token."""
    e = Episodes.of([sample([7, 8], [9, EOS]), sample([5], [6, 4, 3])], torch.device("cpu"))
    assert e.starts == [0, 4, 8] and e.cu_seqlens.tolist() == [0, 4, 8] and e.max_seqlen == 4
    assert e.tokens.tolist() == [7, 8, 9, EOS, 5, 6, 4, 3]
    assert e.mask.tolist() == [False, True, True, False, True, True, True, False]
    assert e.targets[e.mask].tolist() == [9, EOS, 6, 4, 3]
    part = e.take([1, 0])
    assert part.starts == [0, 4, 8] and part.tokens.tolist() == [5, 6, 4, 3, 7, 8, 9, EOS]
    assert part.targets[part.mask].tolist() == [6, 4, 3, 9, EOS]
    assert e.take([1]).tokens.tolist() == [5, 6, 4, 3]


@pytest.mark.checklist(9, 13, 18, 33)
@pytest.mark.bug("ROLL#447")
def test_rewards_advantages_and_returns_by_hand():
    ppo = make(settings(batch=1, minibatch=1, kl_coef=9.0, gamma=1.0, lambda_=0.5))
    ppo.state.extra["kl_coef"] = 0.1  # as it has adapted
    samples = [sample([7, 8], [9, 5, EOS], [-1.1, -2.0, -1.0])]
    episodes = Episodes.of(samples, torch.device("cpu"))
    nan = math.nan  # what lies outside the response must not matter
    episodes.ref_logprobs = torch.tensor([0.0, -3.0, -1.0, -1.0, 0.0])
    episodes.values = torch.tensor([nan, 0.5, 0.25, 1.0, nan])
    assert episodes.old_logprobs[episodes.mask].tolist() == pytest.approx([-1.1, -2.0, -1.0])
    episodes.old_logprobs = torch.tensor([0.0, -1.0, -2.0, -1.0, 0.0])
    metrics = ppo.estimate(episodes, samples, torch.tensor([2.0]))
    # rewards −0.1 · (2, −1, 0), and the score 2 on the last token: −0.2, 0.1, 2
    # δ = −0.2 + 0.25 − 0.5, 0.1 + 1 − 0.25, 2 + 0 − 1 = −0.45, 0.85, 1
    # A = −0.45 + 0.5 · 1.35, 0.85 + 0.5 · 1, 1 = 0.225, 1.35, 1; R = A + V, before whitening
    a = torch.tensor([0.225, 1.35, 1.0])
    mask = episodes.mask
    torch.testing.assert_close(episodes.returns[mask], torch.tensor([0.725, 1.6, 2.0]))
    white = (a - a.mean()) / (a.var(correction=0) + 1e-8).sqrt()
    torch.testing.assert_close(episodes.advantages[mask], white)
    assert episodes.advantages[~mask].tolist() == episodes.returns[~mask].tolist() == [0.0, 0.0]
    assert metrics["objective/kl"] == pytest.approx(1.0)
    assert metrics["objective/reward"] == pytest.approx(1.9)
    assert metrics["objective/entropy"] == pytest.approx(4.0)
    assert metrics["objective/score"] == 2.0 and metrics["rollout/eos_rate"] == 1.0
    assert metrics["rollout/length"] == 3.0


@pytest.mark.checklist(14, 16)
def test_truncated_response_bootstraps_or_not():
    """A response cut off: the state after its last token is worth V, or nothing."""
    samples = [sample([7], [9, 5]), sample([7], [9, EOS])]
    found = {}
    for bootstrap in (False, True):
        config = settings(batch=2, minibatch=1, missing_eos="none", lambda_=1.0)
        ppo = make(replace(config, truncated="bootstrap" if bootstrap else "zero"))
        episodes = Episodes.of(samples, torch.device("cpu"))
        episodes.values = torch.tensor([0.0, 0.0, 10.0, 0.0, 0.0, 10.0])
        ppo.estimate(episodes, samples, torch.tensor([1.0, 1.0]))
        found[bootstrap] = episodes.returns.tolist()
    assert found[False] == [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    assert found[True] == [11.0, 11.0, 0.0, 1.0, 1.0, 0.0]


@pytest.mark.checklist(16)
def test_dropped_responses_teach_nothing():
    """With `drop` a response that was cut off counts in the metrics alone."""
    samples = [sample([7], [9, 5, 3]), sample([7], [9, EOS]), sample([8], [4, EOS])]
    found = {}
    for truncated in ("zero", "drop"):
        ppo = make(settings(batch=3, minibatch=3, missing_eos="none", truncated=truncated))
        episodes = Episodes.of(samples, torch.device("cpu"))
        with torch.no_grad():
            episodes.old_logprobs = ppo_module.response_logprobs(ppo.policy, episodes, 1.0).logprobs
        ppo.assess(episodes, range(3))
        metrics = ppo.estimate(episodes, samples, torch.tensor([50.0, 1.0, 2.0]))
        assert metrics["rollout/eos_rate"] == pytest.approx(2 / 3)
        assert metrics["rollout/length"] == pytest.approx(7 / 3)
        found[truncated] = episodes
    dropped = found["drop"]
    assert dropped.mask[:4].sum() == 0 and found["zero"].mask[:4].sum() == 3
    # What is left is as if the response had not been drawn.
    kept = [samples[1], samples[2]]
    ppo = make(settings(batch=2, minibatch=2, missing_eos="none"))
    alone = Episodes.of(kept, torch.device("cpu"))
    alone.old_logprobs, alone.values = dropped.old_logprobs[4:], dropped.values[4:]
    alone.ref_logprobs = dropped.ref_logprobs[4:]
    ppo.estimate(alone, kept, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(dropped.advantages[4:], alone.advantages)
    torch.testing.assert_close(dropped.returns[4:], alone.returns)
    mine = loss_and_gradient(ppo, dropped, [0, 1, 2])
    assert_same_update(loss_and_gradient(ppo, alone, [0, 1]), mine)
    # With nothing left there is nothing to learn, and no 0 / 0.
    dropped.mask, dropped.states = dropped.mask & False, dropped.states & False
    loss, gradient = loss_and_gradient(ppo, dropped, [0, 1, 2])
    assert loss == 0.0 and not gradient.any()


@pytest.mark.checklist(8)
def test_score_at_the_last_token_or_after_the_end():
    """After the end, the state behind EOS has a value of its own and takes the score (N+)."""
    samples = [sample([7, 8], [9, EOS]), sample([7], [9, 5])]  # the second was cut off
    values = [0.0, 0.5, 1.0, 4.0, 0.25, 2.0, 9.0]
    config = dict(batch=2, minibatch=2, missing_eos="none", kl_coef=0.5, lambda_=0.5, gamma=1.0)
    found = {}
    for place in ("last", "after_end"):
        ppo = make(settings(score_at=place, **config))
        e = found[place] = Episodes.of(samples, torch.device("cpu"))
        e.values = torch.tensor(values)
        e.old_logprobs = torch.tensor([0.0, -1.0, -2.0, 0.0, -1.0, -1.0, 0.0])
        e.ref_logprobs = torch.tensor([0.0, -3.0, -2.0, 0.0, -1.0, -1.0, 0.0])
        metrics = ppo.estimate(e, samples, torch.tensor([3.0, 6.0]))
        assert metrics["objective/reward"] == pytest.approx((-1.0 + 3.0 + 6.0) / 2)
    # The first response: KL penalties −1 and 0. At the last token: δ = −1 + 1 − 0.5, 3 + 0 − 1;
    # A = −0.5 + 0.5 · 2, 2. After the end: δ = −0.5, 0 + 4 − 1, 3 + 0 − 4; A backwards −1,
    # 3 − 0.5, −0.5 + 0.5 · 2.5. The second, cut off, has its score at its last token either way:
    # δ = 0 + 2 − 0.25, 6 − 2; A = 1.75 + 0.5 · 4, 4.
    raw = {"last": [0.5, 2.0, 3.75, 4.0], "after_end": [0.75, 2.5, 3.75, 4.0]}
    for place, e in found.items():
        a, mask = torch.tensor(raw[place]), e.mask
        torch.testing.assert_close(e.returns[mask], a + torch.tensor(values)[mask])
        white = (a - a.mean()) / (a.var(correction=0) + 1e-8).sqrt()
        torch.testing.assert_close(e.advantages[mask], white)
        assert not e.advantages[~mask].any()
    after = found["after_end"]
    assert (after.states != after.mask).nonzero().tolist() == [[3]]
    assert after.returns[3] == -1.0 + 4.0 and found["last"].returns[3] == 0.0
    assert torch.equal(found["last"].states, found["last"].mask)


@pytest.mark.checklist(3)
@pytest.mark.bug("verl#1758")
@pytest.mark.parametrize("place", ["last", "after_end"])
def test_values_learn_at_the_states_that_count(place, monkeypatch):
    """A value's gradient is at the position before each token, and behind an end if it has a score.

    No token's probability is learnt behind an end.
    """
    ppo, seen = make(settings(score_at=place)), []
    e, plain = random_episodes(ppo), ppo_module.state_values

    def look(critic, part):
        seen.append(plain(critic, part))
        seen[-1].retain_grad()
        return seen[-1]

    monkeypatch.setattr(ppo_module, "state_values", look)
    ppo.loss(e, 1.0)[0].backward()
    starts = zip(e.starts[:-1], random_samples(8), strict=True)
    first = [start + len(s.prompt_ids) - 1 for start, s in starts]
    last = [end - 1 + (place == "after_end" and bool(i % 2)) for i, end in enumerate(e.starts[1:])]
    learnt = torch.zeros(len(e.mask), dtype=torch.bool)
    for a, b in zip(first, last, strict=True):
        learnt[a:b] = True
    assert torch.equal(seen[0].grad != 0, learnt)
    assert not e.advantages[~e.mask].any()


@pytest.mark.checklist(15)
def test_observed_tokens_carry_value_and_advantage_through():
    """Tokens that others wrote between two turns of a response: as if they were not there."""
    found = []
    for response in ([9, 5, 3, EOS], [9, 5, 70, 71, 72, 3, EOS]):
        ppo = make(settings(batch=1, minibatch=1, lambda_=0.5, gamma=0.9))
        episodes = Episodes.of([sample([7], response)], torch.device("cpu"))
        said = torch.ones_like(episodes.mask)
        if len(response) > 4:
            said[2:5] = False  # the positions that predict 70, 71 and 72
        episodes.mask = episodes.mask & said
        episodes.values = torch.full(said.shape, 77.0)
        episodes.values[episodes.mask] = torch.tensor([0.5, 0.25, 1.0, -1.0])
        episodes.ref_logprobs[episodes.mask] = torch.tensor([0.1, 0.2, 0.3, 0.4])
        ppo.estimate(episodes, [sample([7], response)], torch.tensor([2.0]))
        assert not episodes.returns[~episodes.mask].any()
        found.append((episodes.advantages[episodes.mask], episodes.returns[episodes.mask]))
    assert_same_bits(found[0][0], found[1][0])
    assert_same_bits(found[0][1], found[1][1])


@pytest.mark.checklist(11, 12)
def test_rewards_are_clipped_and_whitened_as_told():
    """Without values, the return of a last token is its reward."""
    samples = random_samples(8)
    scores = torch.linspace(-9, 9, 8)
    ends = torch.tensor([len(s.completion.token_ids) for s in samples]).cumsum(0) - 1
    for changes in ({"reward_clip": 2.0}, {"whiten_rewards": True}):
        ppo = make(settings(missing_eos="none", kl_coef=0.0, **changes))
        episodes = Episodes.of(samples, torch.device("cpu"))
        metrics = ppo.estimate(episodes, samples, scores)
        expected = scores.clamp(-2, 2)
        if "whiten_rewards" in changes:
            raw = torch.zeros(int(episodes.mask.sum()))
            raw[ends] = scores
            expected = ((raw - raw.mean()) / raw.std(correction=0) + raw.mean())[ends]
        torch.testing.assert_close(episodes.returns[episodes.mask][ends], expected)
        assert metrics["objective/score"] == pytest.approx(0.0, abs=1e-6)  # the raw one


@pytest.mark.checklist(20, 21)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_range": 0.1, "clip_range_high": 0.3, "value_coef": 0.7},
        {"dual_clip": 1.2, "value_clip_range": 0.01},
        {"value_clip_range": 0.0},
    ],
)
def test_loss_is_the_papers(changes):
    """max(−ρA, −clip(ρ)A) + c ½ max((V − R)², (V_clipped − R)²), a mean over response tokens."""
    ppo = make(settings(**changes))
    config, e = ppo.config, random_episodes(ppo)
    generator = torch.Generator().manual_seed(2)
    e.values = e.values + 0.3 * torch.randn(e.values.shape, generator=generator)
    with torch.no_grad():
        loss, _ = ppo.loss(e, e.mask.sum())
        logits = ppo.policy(e.tokens, e.cu_seqlens)[e.mask]
        value = ppo.critic(e.tokens, e.cu_seqlens)[e.mask]
    logprobs = logits.log_softmax(-1).gather(1, e.targets[e.mask, None])[:, 0]
    ratio, a = (logprobs - e.old_logprobs[e.mask]).exp(), e.advantages[e.mask]
    low, high = 1 - config.clip_range, 1 + (config.clip_range_high or config.clip_range)
    policy = torch.maximum(-ratio * a, -ratio.clamp(low, high) * a)
    if config.dual_clip:
        policy = torch.where(a < 0, torch.minimum(policy, -config.dual_clip * a), policy)
    returns, old = e.returns[e.mask], e.values[e.mask]
    value_loss = (value - returns) ** 2
    if config.value_clip_range:
        near = old + (value - old).clamp(-config.value_clip_range, config.value_clip_range)
        value_loss = torch.maximum(value_loss, (near - returns) ** 2)
    expected = (policy + config.value_coef * 0.5 * value_loss).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


# ---- Without a critic

GROUPS = {
    "grpo": lambda r: (r - r.mean()) / (r.std() + 1e-4),
    "dr_grpo": lambda r: r - r.mean(),
    "rloo": lambda r: torch.stack(
        [x - (r.sum() - x) / (len(r) - 1) for x in r]  # the others' mean
    ),
}


def test_group_advantages_by_hand():
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0])
    found = {name: ppo_module.group_advantages(scores, 2, name).tolist() for name in GROUPS}
    root = 2**0.5 + 1e-4  # of the variance with 2 − 1 in the denominator
    assert found["grpo"] == pytest.approx([-1 / root, 1 / root, 0, 0])
    assert found["dr_grpo"] == [-1.0, 1.0, 0.0, 0.0]
    assert found["rloo"] == [-2.0, 2.0, 0.0, 0.0]


@pytest.mark.checklist(9)
@pytest.mark.parametrize("changes", [{}, {"reward_clip": 0.5}, {"missing_eos": "replace"}], ids=str)
@pytest.mark.parametrize("algorithm", GROUPS)
def test_group_algorithms_are_the_papers(algorithm, changes):
    """Advantage, KL term and average of each, against its formula in float64."""
    settled = dict(group_size=4, kl_coef=0.3, max_tokens=9, minibatch=8) | changes
    ppo = make(settings(algorithm=algorithm, **settled))
    config, samples = ppo.config, random_samples(8)
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(8, generator=generator)
    e = Episodes.of(samples, torch.device("cpu"))
    ppo.assess(e, range(8))
    noise = [0.3 * torch.randn(e.mask.shape, generator=generator) * e.mask for _ in range(2)]
    logits = ppo.policy(e.tokens, e.cu_seqlens).detach()
    logprobs = logits.double().log_softmax(-1).gather(1, e.targets.clamp(min=0)[:, None])[:, 0]
    e.old_logprobs = (logprobs.float() + noise[0]) * e.mask
    e.ref_logprobs = (logprobs.float() + noise[1]) * e.mask
    metrics = ppo.estimate(e, samples, scores)
    with torch.no_grad():
        loss, _ = ppo.loss(e, ppo.normalizer(e))

    old, ref, rows = e.old_logprobs.double(), e.ref_logprobs.double(), []
    for row, s in enumerate(samples):
        begin = e.starts[row] + len(s.prompt_ids) - 1
        rows.append(slice(begin, e.starts[row + 1] - 1))
    r = scores.double()
    ended = torch.tensor([i % 2 == 1 for i in range(8)])
    if changes.get("missing_eos") == "replace":
        r = torch.where(ended, r, -1.0)
    else:
        r = torch.where(ended, r, r - 1.0)
    if "reward_clip" in changes:
        r = r.clamp(-0.5, 0.5)
    if algorithm == "rloo":
        r = r - 0.3 * torch.stack([(old - ref)[row].sum() for row in rows])
    assert metrics["objective/reward"] == pytest.approx(r.mean().item(), rel=1e-5)
    a = torch.cat([GROUPS[algorithm](r[:4]), GROUPS[algorithm](r[4:])])
    total = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(rows):
        torch.testing.assert_close(e.advantages[row].double(), a[i].expand(row.stop - row.start))
        ratio = (logprobs[row] - old[row]).exp()
        terms = -torch.minimum(ratio * a[i], ratio.clamp(0.8, 1.2) * a[i])
        if algorithm != "rloo":
            d = ref[row] - logprobs[row]
            terms = terms + 0.3 * (d.exp() - d - 1)
        total += terms.mean() / 8 if algorithm == "grpo" else terms.sum() / (8 * 9)
    assert config.kl_in == ("reward" if algorithm == "rloo" else "loss")
    torch.testing.assert_close(loss.double(), total, rtol=1e-5, atol=1e-6)


def test_a_group_answers_one_prompt():
    """K responses side by side, each drawn on its own; a step has batch / K prompts."""
    ppo = make(settings(algorithm="rloo", group_size=4))
    samples = ppo.rollout(0)
    numbers = [s.prompt.record["number"] for s in samples]
    assert len(samples) == 8 and numbers[:4] == [numbers[0]] * 4 and numbers[4:] == [numbers[4]] * 4
    assert numbers[0] != numbers[4]
    assert len({tuple(s.completion.token_ids) for s in samples}) == 8
    assert [s.sequence for s in ppo.rollout(0)] == [s.sequence for s in samples]
    after = {s.prompt.record["number"] for s in ppo.rollout(1)}
    assert after.isdisjoint(numbers)


# ---- What the loss is divided by, and weighed with


@pytest.mark.checklist(23)
@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_aggregation(aggregate):
    """Means over tokens, of the sequences' means, or over a fixed budget: of one policy loss."""
    ppo = make(settings(aggregate=aggregate, value_coef=0.0, clip_range=1e3, minibatch=8))
    e = random_episodes(ppo)
    e.mask[: e.starts[1]] = e.states[: e.starts[1]] = False  # one response is dropped
    with torch.no_grad():
        loss, _ = ppo.loss(e, ppo.normalizer(e))
        logits = ppo.policy(e.tokens, e.cu_seqlens).double().log_softmax(-1)
    ratio = (logits.gather(1, e.targets.clamp(min=0)[:, None])[:, 0] - e.old_logprobs).exp()
    terms = torch.where(e.mask, -ratio * e.advantages, 0)
    spans = [slice(*span) for span in itertools.pairwise(e.starts[1:])]
    rows, counts = [terms[s] for s in spans], [int(e.mask[s].sum()) for s in spans]
    expected = {
        "token": terms.sum() / sum(counts),
        "sequence": sum(row.sum() / n for row, n in zip(rows, counts, strict=True)) / 7,
        "constant": terms.sum() / (8 * ppo.config.max_tokens),
    }[aggregate]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.checklist(32)
def test_importance_correction_where_generator_and_trainer_differ():
    """min(π / generator's π, cap) weighs the policy loss; π and not the generator's is the old."""
    ppo = make(settings(importance_cap=2.0, value_coef=0.0, minibatch=8))
    samples = ppo.rollout(0)
    true = Episodes.of(samples, torch.device("cpu")).old_logprobs
    told = [math.log(1.5), math.log(4.0), math.log(0.5)]
    for s in samples:
        for i, off in enumerate(told[: len(s.completion.sampled_logprobs)]):
            s.completion.sampled_logprobs[i] -= off
    e = Episodes.of(samples, torch.device("cpu"))
    metrics = ppo.assess(e, range(8))
    assert metrics["ppo/logprob_mismatch"] == pytest.approx(math.log(4.0), rel=1e-5)
    assert_same_bits(e.old_logprobs, true)
    first = e.weights[e.mask.nonzero()[0] + torch.arange(3)]
    assert first.tolist() == pytest.approx([1.5, 2.0, 0.5], rel=1e-5)
    assert e.weights[~e.mask].eq(1).all()
    ppo.estimate(e, samples, torch.arange(8.0))
    loss, _ = ppo.loss(e, ppo.normalizer(e))
    expected = -(e.weights * e.advantages)[e.mask].mean()  # the ratios are 1
    torch.testing.assert_close(loss.detach(), expected)
    uncorrected = make(settings())
    assert "ppo/logprob_mismatch" not in uncorrected.iteration(0)


# ---- Exactness before the first update


@pytest.mark.checklist(34)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("micro_batch", [0, 1, 2])
def test_step_zero_is_exact(family, micro_batch):
    """KL is 0, the first minibatch's ratio is 1 and nothing is clipped: to the last bit.

    Old log-probs are the generator's. Dropout is set, and must be off. Lengths are unequal, and the
    first epoch is shuffled.
    """
    ppo = make(settings(micro_batch=micro_batch), family=family, dropout=0.5)
    samples = ppo.rollout(0)
    episodes = Episodes.of(samples, torch.device("cpu"))
    order = ppo.order(0, 0)
    ppo.assess(episodes, order)
    mask = episodes.mask
    assert (episodes.old_logprobs[mask] < 0).all()
    assert_same_bits(episodes.old_logprobs, episodes.ref_logprobs)
    metrics = ppo.estimate(episodes, samples, torch.zeros(8))
    assert metrics["objective/kl"] == 0.0
    rows = order[:4]
    for micro in ppo_module.pieces(rows, ppo.micro_batch):
        part = episodes.take(micro)
        new = ppo_module.response_logprobs(ppo.policy, part, 1.0)
        assert_same_bits(new.logprobs.detach(), part.old_logprobs)
        _, stats = ppo.loss(part, mask.sum())
        means = stats.means()
        assert means["ratio"] == 1.0 and means["count"] == part.mask.sum()
        assert means["approx_kl"] == means["clipped"] == means["value_clipped"] == 0.0


@pytest.mark.checklist(5)
def test_rollouts_are_from_the_whole_distribution(monkeypatch):
    seen = []

    def look(model, tokenizer, prompts, params, marked):
        seen.append(params)
        return plain(model, tokenizer, prompts, params, marked)

    plain = ppo_module.sample_responses
    monkeypatch.setattr(ppo_module, "sample_responses", look)
    ppo = make(settings(temperature=0.7))
    ppo.rollout(0)
    (p,) = seen
    assert (p.temperature, p.top_p, p.top_k, p.min_p) == (0.7, 1.0, 0, 0.0)
    assert (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) == (1.0, 0.0, 0.0)
    assert not p.logit_bias and p.allowed_token_ids is None and not p.ignore_eos


@pytest.mark.checklist(32)
def test_the_policy_has_no_forward_beside_rollouts_and_updates(monkeypatch):
    """Unless told to check: then on the micro-batches of the first epoch."""
    plain = ppo_module.response_logprobs
    for strict in (False, True):
        ppo = make(settings(micro_batch=2, strict=strict))
        seen = {"policy": [], "reference": []}

        def look(model, part, temperature, entropy=False, ppo=ppo, seen=seen):
            seen["reference" if model is ppo.reference else "policy"].append(part.tokens.tolist())
            return plain(model, part, temperature, entropy)

        monkeypatch.setattr(ppo_module, "response_logprobs", look)
        metrics = ppo.iteration(0)
        assert len(seen["policy"]) == (8 if strict else 4)
        assert seen["policy"][-4:] == seen["reference"] == seen["policy"][:4]
        assert ("ppo/logprob_mismatch" in metrics) == strict
        assert not strict or metrics["ppo/logprob_mismatch"] == 0.0


def test_strict_stops_at_the_first_token_that_differs(monkeypatch):
    ppo = make(settings(strict=True))
    samples, before = ppo.rollout(0), [p.detach().clone() for p in ppo.policy.parameters()]
    told = samples[3].completion.sampled_logprobs
    true = told[1]
    told[1] = float(torch.nextafter(torch.tensor(true), torch.tensor(0.0)))
    samples[5].completion.sampled_logprobs[0] -= 0.5
    monkeypatch.setattr(ppo, "rollout", lambda step: samples)
    position, token = len(samples[3].prompt_ids) + 1, samples[3].completion.token_ids[1]
    with pytest.raises(UserError) as error:
        ppo.iteration(0)
    where = f"--strict: after prompt 3 of this iteration, token {token} at position {position} has"
    count = sum(len(s.completion.token_ids) for s in samples)
    assert str(error.value) == (
        f"{where} log-probability {told[1]!r} from the generator, but {true!r} from the trainer; "
        f"2 of {count} differ"
    )
    for old, p in zip(before, ppo.policy.parameters(), strict=True):
        assert_same_bits(old, p.detach())


@pytest.mark.checklist(34)
def test_first_iteration_reports_exactness():
    """With one minibatch per iteration the metrics themselves show it."""
    ppo = make(settings(minibatch=8, micro_batch=2))
    metrics = ppo.iteration(0)
    assert metrics["objective/kl"] == 0.0 and metrics["ppo/ratio"] == 1.0
    assert metrics["ppo/approx_kl"] == metrics["ppo/clip_fraction"] == 0.0
    assert ppo.iteration(1)["objective/kl"] != 0.0


@pytest.mark.checklist(4)
@pytest.mark.bug("TRL#417")
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_one_temperature_everywhere(temperature):
    """Rollouts, old, new and reference log-probs; so the KL begins at 0 whatever it is."""
    ppo = make(settings(temperature=temperature, minibatch=8, strict=True))
    metrics = ppo.iteration(0)
    assert metrics["ppo/logprob_mismatch"] == 0.0
    assert metrics["objective/kl"] == 0.0 and metrics["ppo/ratio"] == 1.0


# ---- Invariances


def loss_and_gradient(ppo: PPO, episodes: Episodes, rows: list[int]) -> tuple[float, torch.Tensor]:
    """What `update` accumulates for a minibatch, before the optimisers step."""
    seen = {}

    def look(optimizer, lr, clip):
        if not seen:
            seen["gradient"] = gradients(ppo.policy, ppo.critic)
        optimizer.zero_grad()
        return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_module, "apply_gradients", look)
        metrics, _ = ppo.update(0, 0, episodes, rows)
    return metrics["loss"], seen["gradient"]


def assert_same_update(a, b):
    (loss_a, gradient_a), (loss_b, gradient_b) = a, b
    assert abs(loss_a - loss_b) <= 1e-6 * abs(loss_a)
    assert (gradient_a - gradient_b).norm() <= 1e-5 * gradient_a.norm()


@pytest.mark.checklist(22)
@pytest.mark.bug("verl#6957")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"aggregate": "sequence"},
        {"aggregate": "constant", "score_at": "after_end"},
        {"algorithm": "grpo", "group_size": 4, "truncated": "drop"},
    ],
    ids=str,
)
def test_micro_batches_add_up(text, changes):
    """Policy, critic and pre-training mix: the split of a minibatch changes nothing."""
    whole = make(settings(minibatch=8, ptx_batch=4, ptx_context=16, **changes), text=text)
    episodes = random_episodes(whole)
    expected = loss_and_gradient(whole, episodes, list(range(8)))
    for size in (1, 2, 4):
        whole.micro_batch = size
        assert_same_update(expected, loss_and_gradient(whole, episodes, list(range(8))))


def test_order_of_rows_does_not_matter():
    ppo = make(settings(minibatch=8))
    episodes = random_episodes(ppo)
    expected = loss_and_gradient(ppo, episodes, list(range(8)))
    assert_same_update(expected, loss_and_gradient(ppo, episodes, [5, 2, 7, 0, 1, 6, 4, 3]))


@pytest.mark.checklist(2)
def test_each_prompt_is_as_if_alone():
    """Packing: a row's log-probs and values do not depend on its neighbours."""
    ppo = make(settings())
    episodes = Episodes.of(random_samples(8), torch.device("cpu"))
    with torch.no_grad():
        together = ppo_module.response_logprobs(ppo.policy, episodes, 1.0).logprobs
        values = ppo_module.state_values(ppo.critic, episodes)
        for row in range(8):
            alone, index = episodes.take([row]), episodes.index([row])
            logprobs = ppo_module.response_logprobs(ppo.policy, alone, 1.0).logprobs
            torch.testing.assert_close(logprobs, together[index], rtol=1e-5, atol=1e-6)
            lone_values = ppo_module.state_values(ppo.critic, alone)
            torch.testing.assert_close(lone_values, values[index], rtol=1e-5, atol=1e-6)


@pytest.mark.checklist(3)
def test_value_is_of_the_state_before_the_token():
    ppo = make(settings())
    before = Episodes.of([sample([1, 2, 3], [10, 11, 12])], torch.device("cpu"))
    after = Episodes.of([sample([1, 2, 3], [10, 99, 12])], torch.device("cpu"))
    with torch.no_grad():
        a = ppo_module.state_values(ppo.critic, before)
        b = ppo_module.state_values(ppo.critic, after)
    at = int(before.mask.nonzero()[1])  # the position that chooses the second token
    torch.testing.assert_close(a[: at + 1], b[: at + 1])
    assert not torch.allclose(a[at + 1 :], b[at + 1 :])


@pytest.mark.checklist(31, 39)
def test_batch_algebra():
    """Every episode is in one minibatch per epoch, in an order fresh for each epoch and step."""
    ppo = make(settings(inner_epochs=3))
    orders = [ppo.order(step, epoch) for step in range(2) for epoch in range(3)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert ppo.order(1, 2) == orders[5]


@pytest.mark.checklist(39)
def test_rollouts_depend_on_seed_and_step_alone():
    ppo = make(settings())
    first, second = ppo.rollout(0), ppo.rollout(1)
    assert [s.sequence for s in ppo.rollout(0)] == [s.sequence for s in first]
    other = make(settings(run=RunConfig(seed=1))).rollout(0)
    assert [s.sequence for s in other] != [s.sequence for s in first]
    ppo.prompts = [Prompt("same", {"number": 0})] * 12
    assert [s.sequence for s in ppo.rollout(0)] != [s.sequence for s in ppo.rollout(1)]
    # 12 prompts: two iterations of 8 hold each of them once, then begin again.
    numbers = [s.prompt.record["number"] for s in first + second]
    assert sorted(numbers[:12]) == list(range(12)) and len(set(numbers[12:])) == 4


# ---- Updates


@pytest.mark.checklist(36)
def test_pretraining_mix_is_a_backward_of_its_own(text):
    """The gradient is PPO's plus ptx_coef times that of the mean loss per token of text."""
    config = settings(minibatch=8, ptx_batch=4, ptx_context=16, ptx_coef=2.5)
    alone, mixed = make(config), make(config, text=text)
    episodes = random_episodes(alone)
    loss, gradient = loss_and_gradient(alone, episodes, list(range(8)))
    total, both = loss_and_gradient(mixed, episodes, list(range(8)))
    packed = text.batch(0, ppo_module.mix(0, ppo_module.PRETRAIN), 4, 16)
    logits = mixed.policy(packed.tokens, packed.cu_seqlens)
    ptx = torch.nn.functional.cross_entropy(logits, packed.targets)
    ptx.backward()
    mixed.critic.zero_grad(set_to_none=False)
    for p in mixed.critic.parameters():
        p.grad = torch.zeros_like(p)
    expected = gradient + 2.5 * gradients(mixed.policy, mixed.critic)
    assert total == pytest.approx(loss + 2.5 * ptx.item(), rel=1e-5)
    assert (both - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.checklist(25, 30)
def test_update_uses_two_optimisers_with_their_own_rates(monkeypatch):
    seen = []

    def look(optimizer, lr, clip):
        seen.append((optimizer, lr, clip))
        optimizer.zero_grad()
        return 1.0

    monkeypatch.setattr(ppo_module, "apply_gradients", look)
    config = settings(critic_lr=0.5)
    ppo = make(config)
    ppo.update(1, 0, random_episodes(ppo), [0, 1, 2, 3])
    (policy, policy_lr, clip), (critic, critic_lr, _) = seen
    assert policy is ppo.state.optimizers[""] and critic is ppo.state.optimizers["critic"]
    # Step 1 of a warm-up over 2 steps from a tenth: 0.1 + 0.9 / 2 of the rate.
    assert policy_lr == pytest.approx(0.55e-2) and critic_lr == pytest.approx(0.275)
    assert clip == config.optim.grad_clip == 1.0
    assert policy.optim.eps == 1e-5 and (policy.optim.beta1, policy.optim.beta2) == (0.9, 0.95)


@pytest.mark.checklist(26)
def test_learning_rate_of_the_paper():
    """Constant, after ten iterations of warm-up from a tenth."""
    optim = PPOConfig(init="a", reward="b", prompts=("c",)).optim
    rates = [learning_rate(optim, step, 40) / optim.lr for step in (0, 5, 10, 39)]
    assert rates == pytest.approx([0.1, 0.55, 1.0, 1.0])


@pytest.mark.checklist(24, 35)
def test_reference_is_frozen_and_dropout_off(text, tmp_path):
    ppo = make(settings(ptx_batch=4, ptx_context=16), text=text, dropout=0.3)
    model(dropout=0.3).to_scalar_head().save(tmp_path / "judge", TOKENIZER)
    ppo.judge = make_judge(str(tmp_path / "judge"), TOKENIZER, torch.device("cpu"), torch.float32)
    assert ppo.judge.model.config.dropout == 0.3
    before = {name: p.clone() for name, p in ppo.reference.state_dict().items()}
    policy = [p.detach().clone() for p in ppo.policy.parameters()]
    ppo.iteration(0)
    for name, p in ppo.reference.state_dict().items():
        assert_same_bits(p, before[name], name)
    assert all(p.grad is None for p in ppo.reference.parameters())
    assert not any(m.training for m in (ppo.policy, ppo.critic, ppo.reference, ppo.judge.model))
    assert all(not torch.equal(a, b) for a, b in zip(policy, ppo.policy.parameters(), strict=True))


@pytest.mark.checklist(19)
def test_non_finite_gradient_is_skipped_and_counted(monkeypatch):
    ppo = make(settings())
    episodes, plain = random_episodes(ppo), ppo.loss

    def loss(part, normalizer):
        value, stats = plain(part, normalizer)
        return value + (ppo.policy.norm * 0).abs().sqrt().sum(), stats  # 0, its gradient NaN

    monkeypatch.setattr(ppo, "loss", loss)
    policy = [p.detach().clone() for p in ppo.policy.parameters()]
    metrics, _ = ppo.update(0, 0, episodes, [0, 1, 2, 3])
    assert math.isfinite(metrics["loss"]) and not math.isfinite(metrics["ppo/grad_norm"])
    assert ppo.state.extra["skipped_updates"] == 1
    for a, b in zip(policy, ppo.policy.parameters(), strict=True):
        assert_same_bits(a, b.detach())


@pytest.mark.checklist(10)
def test_kl_coefficient_is_fixed_or_adapts():
    fixed, adaptive = make(settings()), make(settings(kl_target=1.0))
    for ppo in (fixed, adaptive):
        ppo.iteration(0)
    assert fixed.state.extra["kl_coef"] == 0.05
    assert adaptive.state.extra["kl_coef"] == 0.05 * (1 - 0.2 * 8 / 1e4)  # the KL is 0 at first


@pytest.mark.checklist(37)
def test_average_follows_every_update_and_is_exported():
    ppo = make(settings(ema=0.9))
    expected = {n: p.detach().clone() for n, p in ppo.policy.named_parameters()}
    episodes = random_episodes(ppo)
    for number in range(3):
        ppo.update(0, number, episodes, [0, 1, 2, 3])
        for name, p in ppo.policy.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * p.detach()
    for name, value in expected.items():
        torch.testing.assert_close(ppo.state.tensors[f"ema.{name}"], value)
    last = ppo.policy.embed.detach().clone()
    ppo.export_average()
    torch.testing.assert_close(ppo.policy.embed.detach(), expected["embed"])
    assert_same_bits(ppo.state.tensors["last.embed"], last)
    assert not make(settings(ema=0.0)).state.tensors


@pytest.mark.checklist(33)
def test_statistics_are_masked():
    """Means over the responses' tokens of the iteration, whatever lies around them."""
    ppo = make(settings())
    episodes = random_episodes(ppo)
    episodes.old_logprobs[~episodes.mask] = math.nan
    episodes.advantages[~episodes.mask] = math.nan
    halves = [0, 1, 2, 3], [4, 5, 6, 7]
    updates = [ppo.update(0, i, episodes, rows) for i, rows in enumerate(halves)]
    metrics = ppo_module.summarise(updates)
    names = ("policy_loss", "value_loss", "approx_kl", "ratio", "clip_fraction")
    assert all(math.isfinite(metrics[f"ppo/{name}"]) for name in names)
    assert 0 < metrics["ppo/clip_fraction"] < 1 and metrics["ppo/approx_kl"] > 0
    assert metrics["ppo/explained_variance"] <= 1


# ---- Whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A policy, a reward model, prompts and text on disk."""
    path = tmp_path_factory.mktemp("ppo")
    policy = model()
    policy.save(path / "init", TOKENIZER)
    policy.to_scalar_head().save(path / "reward", TOKENIZER)
    lines = [json.dumps({"prompt": p.text}) for p in prompts()]
    (path / "prompts.jsonl").write_text("\n".join(lines))
    (path / "text.txt").write_text("hello there, some text to learn from. " * 40)
    return path


def whole(folder: Path, out: Path, **changes) -> PPOConfig:
    run = RunConfig(out=str(out), save_every=2, log_every=1, **changes.pop("run", {}))
    init, files = str(folder / "init"), (str(folder / "prompts.jsonl"),)
    return settings(**{"init": init, "prompts": files, "reward": "", "run": run} | changes)


def metrics_of(out: Path) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in WALL_CLOCK} for line in lines]


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*.safetensors")}


def test_run_raises_a_simple_reward(folder, tmp_path):
    config = whole(
        folder, tmp_path / "run", steps=10, batch=32, minibatch=8, inner_epochs=2, max_tokens=4,
        kl_coef=0.01, missing_eos="none", optim=replace(settings().optim, lr=2e-2),
    )  # fmt: skip
    final = ppo_module.run(config, reward=letters)
    scores = [m["objective/score"] for m in metrics_of(tmp_path / "run")]
    assert scores[-1] > scores[0] + 0.3, scores
    assert (final / "model.safetensors").exists() and (final / "critic").is_dir()


@pytest.mark.parametrize("algorithm", GROUPS)
def test_run_without_a_critic(folder, tmp_path, algorithm, capsys):
    """It learns; no critic is built, saved or reported."""
    changes = dict(
        algorithm=algorithm, group_size=4, steps=10, batch=32, minibatch=8, inner_epochs=2,
        max_tokens=4, kl_coef=0.01, missing_eos="none", ema=0.0,
        optim=replace(settings().optim, lr=2e-2),
    )  # fmt: skip
    final = ppo_module.run(whole(folder, tmp_path / "run", **changes), letters)
    metrics = metrics_of(tmp_path / "run")
    scores = [m["objective/score"] for m in metrics]
    assert scores[-1] > scores[0] + 0.3, scores
    assert not (final / "critic").exists()
    assert sorted(files_of(final)) == ["model.safetensors", "state/optimizer.safetensors"]
    assert not [name for name in metrics[0] if "value" in name or "critic" in name]
    assert metrics[0]["objective/kl"] == 0.0
    assert f"aggregate {ALGORITHMS[algorithm]['aggregate'][0]} (" in capsys.readouterr().out


class Killed(Exception):
    pass


@pytest.mark.checklist(40)
@pytest.mark.bug("NeMo-RL#3171")
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, algorithm):
    """Policy, critic, both optimisers, averages, KL coefficient and metrics, bit for bit."""
    changes = dict(
        steps=5, inner_epochs=2, kl_target=0.5, reward=str(folder / "reward"),
        pretrain_data=(str(folder / "text.txt"),), ptx_batch=2, ptx_context=16,
        algorithm=algorithm, group_size=4 if algorithm == "grpo" else 1,
    )  # fmt: skip
    whole_run = ppo_module.run(whole(folder, tmp_path / "a", **changes))

    def killed_at_step_3(self, step):
        if step == 3:
            raise Killed
        return iteration(self, step)

    iteration = PPO.iteration
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPO, "iteration", killed_at_step_3)
        with pytest.raises(Killed):
            ppo_module.run(whole(folder, tmp_path / "b", **changes))
    resumed = ppo_module.run(whole(folder, tmp_path / "b", run={"resume": True}, **changes))
    a, b = files_of(whole_run), files_of(resumed)
    assert sorted(a) == sorted(b) and len(a) == (5 if algorithm == "ppo" else 3)
    assert [name for name in a if a[name] != b[name]] == []
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
    states = [json.loads((p / "state" / "trainer.json").read_text()) for p in (whole_run, resumed)]
    assert states[0] == states[1] and states[0]["extra"]["kl_coef"] != 0.05


@pytest.mark.checklist(37)
def test_final_is_the_average_when_asked(folder, tmp_path):
    from instructcore.model import load

    last = load(ppo_module.run(whole(folder, tmp_path / "a", steps=2, ema=0.9), letters))
    changes = {"steps": 2, "ema": 0.9, "export_ema": True}
    average = load(ppo_module.run(whole(folder, tmp_path / "b", **changes), letters))
    start = load(folder / "init")
    moved = [(m.embed - start.embed).norm() for m in (last, average)]
    assert 0 < moved[1] < moved[0]


@pytest.mark.checklist(30)
def test_critic_begins_as_the_reward_model(folder):
    policy, cpu = model(), torch.device("cpu")
    judge = make_judge(str(folder / "reward"), TOKENIZER, cpu, torch.float32)
    critic = ppo_module.make_critic(judge, policy, 0)
    for (name, a), b in zip(critic.named_parameters(), judge.model.parameters(), strict=True):
        assert_same_bits(a.detach(), b, name)
        assert a.requires_grad and not b.requires_grad and a.data_ptr() != b.data_ptr()


@pytest.mark.checklist(27)
def test_critic_without_a_reward_model_is_the_policy_under_a_new_head():
    policy = model(width=512, heads=8)
    judge = make_judge(letters, TOKENIZER, torch.device("cpu"), torch.float32)
    critic = ppo_module.make_critic(judge, policy, 0)
    assert_same_bits(critic.embed.detach(), policy.embed.detach())
    assert critic.score.std().item() * math.sqrt(513) == pytest.approx(1.0, abs=0.15)


PATHS = dict(init="a", reward="b", prompts=("c",))


@pytest.mark.checklist(14)
def test_presets():
    paper = PPOConfig(**PATHS, preset="instructgpt")
    assert (paper.batch, paper.minibatch, paper.ptx_coef, paper.kl_coef) == (512, 64, 27.8, 0.02)
    assert paper.critic_lr == 9e-6 and paper.optim.lr == 8e-6 and paper.ema == 0.992
    assert (paper.gamma, paper.lambda_) == (1.0, 0.95) == (settings().gamma, settings().lambda_)
    assert paper.steps * paper.batch == 256_000 and paper.ptx_batch == 8 * paper.minibatch
    rates = [learning_rate(paper.optim, step, 500) / paper.optim.lr for step in (0, 5, 10, 499)]
    assert rates == pytest.approx([0.1, 0.55, 1.0, 1.0])
    mine = PPOConfig(**PATHS, preset="instructgpt", batch=64, optim=OptimConfig(lr=1e-3))
    assert mine.batch == 64 and mine.optim.lr == 1e-3 and mine.ptx_coef == 27.8
    assert "batch" not in mine.sources() and "lr" not in mine.sources()
    assert mine.sources()["kl_coef"] == (0.02, "C.4")


def test_preset_of_huang_et_al():
    c = PPOConfig(**PATHS, preset="nplus_tldr")
    assert (c.batch, c.minibatch, c.inner_epochs, c.steps) == (512, 512, 4, 1_000_000 // 512)
    assert (c.optim.lr, c.critic_lr, c.optim.eps, c.kl_coef) == (3e-6, 3e-6, 1e-5, 0.05)
    assert (c.gamma, c.lambda_, c.clip_range, c.value_clip_range) == (1.0, 0.95, 0.2, 0.2)
    assert (c.value_coef, c.temperature, c.max_tokens, c.whiten_rewards) == (0.1, 0.7, 53, False)
    assert (c.missing_eos, c.missing_eos_penalty, c.score_at) == ("replace", 1.0, "after_end")
    # Their frac is 1 at the first update and 1 / updates at the last.
    rates = [learning_rate(c.optim, step, c.steps) for step in (0, c.steps - 1)]
    assert rates == pytest.approx([3e-6, 3e-6 / c.steps])


def test_preset_of_ziegler_et_al():
    c = PPOConfig(**PATHS, preset="lm_human_preferences")
    assert (c.batch, c.minibatch, c.inner_epochs) == (512, 512, 4)
    assert c.steps == -(-1_000_000 // 512)
    assert (c.optim.lr, c.optim.eps, c.kl_coef, c.kl_target) == (1e-5, 1e-5, 0.15, 6.0)
    assert (c.kl_horizon, c.gamma, c.lambda_, c.value_coef) == (10000, 1.0, 0.95, 0.1)
    assert c.whiten_rewards and c.optim.weight_decay == c.optim.grad_clip == 0.0
    assert learning_rate(c.optim, c.steps // 2, c.steps) == pytest.approx(0.5e-5)


@pytest.mark.checklist(42)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_settings_and_say_where_from(preset):
    """So does every algorithm; and a value in no table is marked as the project's own choice."""
    for algorithm, table in ALGORITHMS.items():
        config = PPOConfig(**PATHS, preset=preset, algorithm=algorithm, whiten_rewards=False,
                           given=("whiten_rewards",))  # fmt: skip
        now, sources = flatten(config), config.sources()
        assert sources.keys() <= now.keys()
        for name, (value, source) in (PRESETS[preset] | table).items():
            if name != "whiten_rewards":
                assert now[name] == value and sources[name] == (value, source) and source
        unnamed = sources.keys() - PRESETS[preset].keys() - table.keys()
        assert unnamed and all(sources[name][1] == OUR_CHOICE for name in unnamed)


def test_presets_leave_alone_what_is_given():
    """Even at its default; a copy with another setting keeps it so."""
    given = {"kl_coef": 0.05, "lr": 1e-4, "export_ema": False}
    told = unflatten(PPOConfig, {**PATHS, "preset": "instructgpt", **given})
    for config in (told, replace(told, run=RunConfig(seed=1))):
        assert (config.kl_coef, config.optim.lr, config.export_ema) == (0.05, 1e-4, False)
        assert config.batch == 512 and not given.keys() & config.sources().keys()
    config = PPOConfig(**PATHS, preset="instructgpt", given=("kl_coef",))
    assert config.kl_coef == 0.05 and config.sources()["batch"] == (512, "C.4")
    with pytest.raises(UserError, match="given must name settings, got kl-coef"):
        PPOConfig(**PATHS, given=("kl-coef",))


@pytest.mark.checklist(42)
def test_a_run_prints_every_value_that_no_flag_sets(folder, tmp_path, capsys):
    arguments = dict(
        init=folder / "init", reward=folder / "reward", prompts=folder / "prompts.jsonl",
        out=tmp_path / "run", preset="instructgpt", steps=1, batch=4, minibatch=4, max_tokens=4,
        kl_coef=0.05,
    )  # fmt: skip
    flags = [w for k, v in arguments.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    assert cli.main(["ppo", *flags]) == 0
    printed = capsys.readouterr().out
    assert "preset instructgpt: ptx_coef 27.8 (C.4)" in printed
    assert "preset instructgpt: weight_decay 0.0 (our choice)" in printed
    assert not [name for name in arguments if f"preset instructgpt: {name} " in printed]
    lines = [line.split()[3] for line in printed.splitlines() if ": preset instructgpt: " in line]
    apart = {"algorithm", "pretrain_data", "held_out", *flatten(RunConfig()), *arguments}
    assert sorted(lines) == sorted(flatten(settings()).keys() - apart)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert saved["kl_coef"] == 0.05 and saved["ptx_coef"] == 27.8 and "given" not in saved


# ---- Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 10, "minibatch": 4}, "--minibatch must divide --batch, got 4 and 10"),
        ({"micro_batch": 3}, "--micro-batch must divide --minibatch, got 3 and 4"),
        ({"kl_coef": -1.0}, r"--kl-coef must be in \[0, inf\), got -1"),
        ({"lambda_": 1.5}, r"--lambda must be in \[0, 1\], got 1.5"),
        ({"missing_eos": "maybe"}, "--missing-eos must be one of"),
        ({"preset": "gpt5"}, "--preset must be one of"),
        ({"temperature": 0.0}, "--temperature must be in"),
        ({"dual_clip": 0.5}, r"--dual-clip must be 0 \(none\) or above 1, got 0.5"),
        ({"ema": 0.0, "export_ema": True}, "--export-ema needs --ema"),
        ({"prompts": ()}, "--prompts is missing"),
        ({"reward": "gold"}, "--reward gold: PPO never sees the rule"),
        ({"group_size": 3}, "--group-size must divide --batch, got 3 and 8"),
        ({"algorithm": "grpo", "group_size": 1, "given": ("group_size",)}, "--group-size above 1"),
        ({"algorithm": "rloo", "truncated": "bootstrap"}, "rloo has no critic: --truncated zero"),
        ({"algorithm": "grpo", "whiten_rewards": True}, "grpo has no rewards per token"),
    ],
)
def test_rejects_settings(changes, message):
    with pytest.raises(UserError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "reward", "message"),
    [
        ({}, None, "--reward is missing"),
        ({"reward": "no.such.module:f"}, None, "cannot load the function no.such.module:f"),
        ({"reward": "json:nothing"}, None, "cannot load the function json:nothing"),
        ({"reward": "json:__name__"}, None, "json:__name__ must be a function, got 'json'"),
        ({"reward": "nowhere"}, None, "nowhere"),
        ({}, lambda p, r, c: [1.0], "must return a score per response, got 1 for 8"),
        ({}, lambda p, r, c: [math.nan] * len(p), "a reward must be finite, got nan"),
        ({"max_tokens": 40}, letters, "4 of 12 prompts .* do not fit the context of 48"),
    ],
)
def test_rejects_what_a_run_finds(folder, tmp_path, changes, reward, message):
    config = whole(folder, tmp_path / "run", **changes)
    with pytest.raises(UserError, match=message):
        ppo_module.run(config, reward)
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward", "gold"], "--reward gold: PPO never sees the rule that judges it"),
        (["--reward", "nowhere"], "no checkpoint at nowhere"),
        (["--reward", "json:nothing"], "cannot load the function json:nothing"),
        (["--reward", "cut"], "model.safetensors: not a readable safetensors file"),
        (["--reward", "init"], "is no reward model: it has no scalar head"),
        (["--prompts", "long.txt"], "1 of 1 prompts with 6 more tokens of response do not fit"),
        (["--pretrain-data", "text.txt", "--ptx-context", "48", "--prompts", "none"], "none: No"),
        (["--pretrain-data", "short.txt", "--ptx-context", "48"], "longer than the context of 48"),
        (["--out", "text.txt/run"], "--out text.txt/run: "),
        (["--out", "/proc/nowhere/run"], "/proc/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    folder, tmp_path, monkeypatch, capsys, flags, message
):
    for name in ("init", "reward"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copytree(folder / "reward", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    monkeypatch.chdir(tmp_path)
    for name, words in {"prompts": 3, "long": 20, "text": 40, "short": 4}.items():
        (tmp_path / f"{name}.txt").write_text("hello " * words)
    before = sorted(tmp_path.rglob("*"))
    defaults = {"init": "init", "reward": "reward", "prompts": "prompts.txt", "out": "runs/run"}
    defaults |= {"batch": "4", "minibatch": "4", "max_tokens": "6", "steps": "1"}
    assert cli.main(command_line("ppo", flags, **defaults)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "--overlong" not in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_directory_in_use_is_left_alone(folder, tmp_path, capsys):
    ppo_module.run(whole(folder, tmp_path / "run", steps=1), letters)
    before = files_of(tmp_path)
    flags = ["--prompts", str(folder / "prompts.jsonl"), "--out", str(tmp_path / "run")]
    flags += ["--init", str(folder / "init"), "--reward", str(folder / "reward")]
    assert cli.main(["ppo", *flags]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert files_of(tmp_path) == before


def test_rejects_wrong_checkpoints(folder, tmp_path):
    with pytest.raises(UserError, match="is a reward model: it cannot write"):
        config = whole(folder, tmp_path / "a", init=str(folder / "reward"))
        ppo_module.run(config, letters)
    with pytest.raises(UserError, match="is no reward model"):
        ppo_module.run(whole(folder, tmp_path / "b", reward=str(folder / "init")))
    with pytest.raises(UserError, match="--ptx-context must fit the context 48, got 64"):
        texts = (str(folder / "text.txt"),)
        ppo_module.run(whole(folder, tmp_path / "c", pretrain_data=texts, ptx_context=64), letters)
