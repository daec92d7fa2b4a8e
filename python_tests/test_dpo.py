"""Direct preference optimisation: equation 7, what step 0 must show, batch algebra, learning."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from toy_data import (
    UNREAD,
    command_line,
    files_of,
    read_metrics,
    save_model,
    write_comparisons,
    write_jsonl,
)

from instructcore import cli
from instructcore.config import OptimConfig, RunConfig
from instructcore.dpo import FIGURES, DPOConfig, batch_loss, evaluate, pair_loss, run
from instructcore.model import GPT, ModelConfig, load
from instructcore.reward import Ranking, pairs_of
from instructcore.tokenizer import Tokenizer

VARIANTS = {
    "equation 7": {},
    "strong": {"beta": 2.0},
    "smoothed": {"label_smoothing": 0.2},
    "ipo": {"loss": "ipo"},
    "mean": {"length_normalised": True, "beta": 1.0},
}


def random_model(seed):
    """A model whose predictions are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    config = ModelConfig(vocab_size=40, context=32, layers=2, heads=2, width=16)
    model = GPT(config, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def models():
    return random_model(0), random_model(1).requires_grad_(False)


def random_rankings(n=6, seed=0):
    """2 to 5 responses of 1 to 9 tokens to each prompt of 1 to 6, with ties; one pair at least."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator).tolist()

    made = []
    for _ in range(n):
        prompt, k = draw(0, 40, draw(1, 7)), draw(2, 6)
        rows = [prompt + draw(0, 40, draw(1, 10)) for _ in range(k)]
        ranks = draw(0, 3, k - 1) + [9]
        made.append(Ranking(rows, pairs_of(ranks), 0, len(prompt), UNREAD))
    return made


def truth(policy, reference, rankings, config):
    """The definition, pair by pair, each response alone; float64 from the hidden states on."""

    def logprob(model, row, begin):
        tokens, cut = torch.tensor(row), torch.tensor([0, len(row)], dtype=torch.int32)
        logits = model.hidden(tokens, cut).double() @ model.head_weight.double().T
        return -F.cross_entropy(logits[begin - 1 : -1], tokens[begin:], reduction="none")

    total = 0.0
    for rows, pairs, _, begin, _ in rankings:
        losses = []
        for pair in pairs:
            (w, ref_w), (lo, ref_l) = (
                [logprob(model, rows[i], begin) for model in (policy, reference)] for i in pair
            )
            if config.length_normalised:
                h = (w.mean() - ref_w.mean()) - (lo.mean() - ref_l.mean())
            else:
                h = (w.sum() - ref_w.sum()) - (lo.sum() - ref_l.sum())
            if config.loss == "ipo":
                losses.append((h - 1 / (2 * config.beta)) ** 2)
            else:
                right, wrong = torch.sigmoid(config.beta * h), torch.sigmoid(-config.beta * h)
                smooth = config.label_smoothing
                losses.append(-(1 - smooth) * right.log() - smooth * wrong.log())
        total = total + torch.stack(losses).mean()
    return total / len(rankings)


def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def config_for(tmp_path, name="run", **settings):
    base, data = tmp_path / "base", tmp_path / "data.jsonl"
    if not base.exists():
        save_model(base)
        write_comparisons(data)
    out = RunConfig(dtype="float32", out=str(tmp_path / name), log_every=1)
    defaults = {"batch": 8, "optim": OptimConfig(lr=1e-2, weight_decay=0.0), "run": out}
    return DPOConfig(str(base), (str(data),), **(defaults | settings))


def test_pair_loss_known_values():
    # log π − log π_ref is −10 + 11 = 1 of the better and −12 + 11.5 = −0.5 of the worse response:
    # h = 1.5, a margin of 0.15 at β = 0.1.
    # sigmoid: log(1 + e^−0.15) = 0.620957, and of the other order log(1 + e^0.15) = 0.770957.
    # ipo: (1.5 − 1 / 0.2)² = 12.25.
    margin = torch.tensor([0.15])
    assert pair_loss(margin, DPOConfig()).item() == pytest.approx(0.620957, abs=1e-6)
    smoothed = DPOConfig(label_smoothing=0.1)
    expected = 0.9 * 0.620957 + 0.1 * 0.770957
    assert pair_loss(margin, smoothed).item() == pytest.approx(expected, abs=1e-6)
    assert pair_loss(margin, DPOConfig(loss="ipo")).item() == pytest.approx(12.25, rel=1e-5)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=list(VARIANTS))
def test_matches_the_definition_in_float64(models, settings):
    """Loss and gradient, of random cases."""
    policy, reference = models
    config = DPOConfig(**settings)
    for seed in range(4):
        made = random_rankings(seed=seed)
        expected = truth(policy, reference, made, config)
        loss = batch_loss(policy, reference, made, len(made), config).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        ours, theirs = gradient(loss, policy), gradient(expected, policy)
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_figures_are_means_over_the_pairs_of_each_prompt(models):
    policy, reference = models
    # Prompt 1: one pair; prompt 2: response 1 beats the tied 0 and 2.
    made = [
        Ranking([[1, 2, 3], [1, 4]], [(0, 1)], 0, 1, UNREAD),
        Ranking([[5, 6, 7], [5, 6, 8], [5, 6, 9]], [(1, 0), (1, 2)], 1, 2, UNREAD),
    ]
    found = batch_loss(policy, reference, made, 2, DPOConfig(beta=0.5))

    def logp(model, row, begin):
        tokens, cut = torch.tensor(row), torch.tensor([0, len(row)], dtype=torch.int32)
        scores = model(tokens, cut).log_softmax(-1)
        return sum(scores[t - 1, row[t]] for t in range(begin, len(row))).item()

    logps = [[logp(m, row, r.begin) for r in made for row in r.rows] for m in models]
    rewards = [0.5 * (a - b) for a, b in zip(*logps, strict=True)]
    assert found.rewards.tolist() == pytest.approx(rewards, rel=1e-4, abs=1e-5)
    weighted = [(0, 1, 1 / 2), (3, 2, 1 / 4), (3, 4, 1 / 4)]  # better, worse, weight
    expected = {
        "rewards/chosen": sum(w * rewards[i] for i, _, w in weighted),
        "rewards/rejected": sum(w * rewards[j] for _, j, w in weighted),
        "rewards/accuracies": sum(w * (rewards[i] > rewards[j]) for i, j, w in weighted),
        "rewards/margins": sum(w * (rewards[i] - rewards[j]) for i, j, w in weighted),
        "logps/chosen": sum(w * logps[0][i] for i, _, w in weighted),
        "logps/rejected": sum(w * logps[0][j] for _, j, w in weighted),
    }
    figures = dict(zip(FIGURES, found.figures.tolist(), strict=True))
    assert figures == pytest.approx(expected, rel=1e-4)
    # Held out, the same numbers: a pair counts once, whatever its prompt has beside it.
    held_out = evaluate(policy, reference, made, DPOConfig(beta=0.5, batch=1))
    assert held_out["val_loss"] == pytest.approx(found.loss.item(), rel=1e-5)
    right = sum(rewards[i] > rewards[j] for i, j, _ in weighted)
    assert held_out["accuracy"] == pytest.approx(right / 3)


def test_micro_batches_add_up(models):
    policy, reference = models
    made, config = random_rankings(8), DPOConfig()
    whole = batch_loss(policy, reference, made, 8, config)
    expected = gradient(whole.loss, policy)
    for size in (1, 2, 4):
        cuts = [made[i : i + size] for i in range(0, 8, size)]
        parts = [batch_loss(policy, reference, part, 8, config) for part in cuts]
        loss = sum(part.loss for part in parts)
        assert abs(loss - whole.loss) <= 1e-6 * whole.loss
        torch.testing.assert_close(sum(part.figures for part in parts), whole.figures)
        assert (gradient(loss, policy) - expected).norm() <= 1e-5 * expected.norm()


def test_order_does_not_matter(models):
    """Neither that of the prompts, nor that of a prompt's responses in the file."""
    policy, reference = models
    made, config = random_rankings(8), DPOConfig()
    shuffled = []
    for rows, pairs, _, begin, _ in made[::-1]:
        last = len(rows) - 1
        shuffled.append(
            Ranking(rows[::-1], [(last - i, last - j) for i, j in pairs], 0, begin, UNREAD)
        )
    one, other = (batch_loss(policy, reference, x, 8, config) for x in (made, shuffled))
    assert abs(one.loss - other.loss) <= 1e-6 * one.loss
    torch.testing.assert_close(one.figures, other.figures)
    ours, theirs = (gradient(x.loss, policy) for x in (one, other))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_before_the_first_update_there_is_no_margin(tmp_path, dtype):
    save_model(tmp_path / "base", dropout=0.5)  # which no comparison may see
    write_comparisons(tmp_path / "data.jsonl")
    out = RunConfig(dtype=dtype, out=str(tmp_path / "run"), log_every=1)
    run(config_for(tmp_path, micro_batch=2, run=out))
    first, *others = read_metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert all(first[f"rewards/{name}"] == 0.0 for name in ("chosen", "rejected", "margins"))
    assert first["rewards/accuracies"] == pytest.approx(0.5)
    assert all(line["rewards/margins"] != 0.0 for line in others)


def test_it_learns_what_is_preferred(tmp_path):
    final = run(config_for(tmp_path, epochs=8))
    last = read_metrics(tmp_path / "run")[-1]
    assert last["accuracy"] > 0.9 and last["val_loss"] < 0.5
    assert last["accuracy_low"] <= last["accuracy"] <= last["accuracy_high"]
    assert last["rewards/accuracies"] > 0.9 and last["rewards/margins"] > 0.5
    margin = last["rewards/chosen"] - last["rewards/rejected"]
    assert last["rewards/margins"] == pytest.approx(margin, rel=1e-4)
    # "yes" has gained on "no", against the model that the policy began as.
    tokenizer = Tokenizer.load(final)
    gains = []
    for answer in ("yes yes", "no no"):
        ids = [*tokenizer.prompt_ids("well 1?"), *tokenizer.encode(answer), tokenizer.eos_id]
        begin, cut = len(tokenizer.prompt_ids("well 1?")), torch.tensor([0, len(ids)])
        now, before = (
            load(path)(torch.tensor(ids), cut.int()).log_softmax(-1)[begin - 1 : -1]
            for path in (final, tmp_path / "base")
        )
        tokens = torch.tensor(ids[begin:])[:, None]
        gains.append((now - before).gather(1, tokens).sum().item())
    assert gains[0] > gains[1] + 5


def test_chosen_and_rejected_pairs(tmp_path):
    config = config_for(tmp_path, epochs=8, loss="ipo", beta=0.5)
    records = [
        {"prompt": "abcdefgh"[i % 8] * (1 + i // 8), "chosen": "yes", "rejected": "no"}
        for i in range(32)
    ]
    write_jsonl(tmp_path / "data.jsonl", records)
    run(config)
    last = read_metrics(tmp_path / "run")[-1]
    assert last["accuracy"] == 1.0
    assert last["rewards/margins"] == pytest.approx(0.5, abs=0.25)  # where ipo is 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "missing.jsonl"], "missing.jsonl: No such file"),
        (["--data", "ties.jsonl"], "no comparison to learn from: all of them are ties"),
        (["--data", "long.jsonl"], "1 of 1 comparisons do not fit the context of 32 tokens"),
        (["--data", "long.jsonl", "--overlong", "error"], "long.jsonl:1: 43 tokens, more than"),
        (["--batch", "100"], "--batch must be at most the 43 prompts to train on, got 100"),
        (["--micro-batch", "3"], "--micro-batch must divide --batch, got 3 and 8"),
        (["--init", "reward"], "--init reward is a reward model"),
        (["--init", "missing"], "no checkpoint at missing"),
        (["--beta", "0"], "--beta must be in (0, inf), got 0.0"),
        (["--loss", "ipo", "--label-smoothing", "0.1"], "--label-smoothing 0.1 is of sigmoid"),
        (["--out", "data.jsonl/run"], "--out data.jsonl/run: "),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "base")
    load(tmp_path / "base").to_scalar_head().save(tmp_path / "reward", Tokenizer.bytes())
    write_comparisons(tmp_path / "data.jsonl")
    tie = {"prompt": "x", "responses": ["a", "b"], "ranks": [1, 1]}
    write_jsonl(tmp_path / "ties.jsonl", [tie])
    write_jsonl(tmp_path / "long.jsonl", [{"prompt": "x", "chosen": "y" * 40, "rejected": "z"}])
    defaults = {"init": "base", "data": "data.jsonl", "out": "run", "batch": "8"}
    assert cli.main(command_line("dpo", flags, **defaults)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_directory_in_use_is_left_alone(tmp_path, capsys):
    config = config_for(tmp_path)
    run(config)
    before = files_of(tmp_path)
    flags = ["--init", config.init, "--data", *config.data, "--out", config.run.out]
    assert cli.main(["dpo", *flags]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert files_of(tmp_path) == before
