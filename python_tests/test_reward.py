"""The reward model: the K-wise loss, where a score is read, accuracy, calibration."""

from __future__ import annotations

import itertools
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
    write_demonstrations,
    write_jsonl,
)

from instructcore import cli
from instructcore.config import OptimConfig, RunConfig
from instructcore.data import Comparison, encode_demonstrations, read_demonstrations
from instructcore.model import GPT, ModelConfig, load
from instructcore.reward import (
    Ranking,
    RewardConfig,
    accuracy,
    batch_loss,
    encode,
    evaluate,
    mean_score,
    pairs_of,
    ranking_loss,
    response_scores,
    run,
)
from instructcore.tokenizer import Tokenizer


def scalar_model(seed=0):
    config = ModelConfig(vocab_size=259, context=32, layers=2, heads=2, width=16)
    return GPT(config, "scalar", generator=torch.Generator().manual_seed(seed))


def rankings(n=6, k=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        rows = [torch.randint(0, 256, (5 + i,), generator=generator).tolist() for i in range(k)]
        ranks = torch.randint(0, 3, (k - 1,), generator=generator).tolist() + [9]
        made.append(Ranking(rows, pairs_of(ranks), 0, 2, UNREAD))
    return made


def config_for(tmp_path, name="run", **settings):
    base, data = tmp_path / "base", tmp_path / "data.jsonl"
    if not base.exists():
        save_model(base)
        write_comparisons(data)
    out = RunConfig(dtype="float32", out=str(tmp_path / name), log_every=1)
    defaults = {"batch": 8, "optim": OptimConfig(lr=1e-2), "run": out}
    return RewardConfig(str(base), (str(data),), **(defaults | settings))


@pytest.mark.checklist(29)
def test_pairs_leave_ties_out():
    assert pairs_of([1, 2, 2, 3]) == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    assert pairs_of([0.5, 0.5]) == []


def test_ranking_loss_known_value():
    # Two prompts: scores (1, 0) with one pair, (0, 2, 0) with two: (log(1+e^-1) +
    # (log(1+e^-2) + log(1+e^2)) / 2) / 2 = (0.313262 + (0.126928 + 2.126928) / 2) / 2.
    scores = torch.tensor([1.0, 0.0, 0.0, 2.0, 0.0])
    better, worse = torch.tensor([0, 3, 4]), torch.tensor([1, 2, 3])
    weight = torch.tensor([0.5, 0.25, 0.25])
    loss = ranking_loss(scores, better, worse, weight)
    assert loss.item() == pytest.approx((0.3132617 + (0.1269280 + 2.1269280) / 2) / 2, rel=1e-6)


@pytest.mark.checklist(29)
def test_k_forwards_equal_all_pairs_one_by_one():
    """The paper's loss, −1 / pairs Σ log σ(r_w − r_l), each response scored alone."""
    model, made = scalar_model(), rankings()
    total = 0.0
    for ranking in made:
        losses = []
        for better, worse in ranking.pairs:
            w, lo = (response_scores(model, [ranking.rows[i]])[0] for i in (better, worse))
            losses.append(-F.logsigmoid(w - lo))
        total = total + torch.stack(losses).mean()
    expected = total / len(made)
    loss, scores = batch_loss(model, made, len(made))
    assert scores.shape == (24,)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    ours, theirs = (torch.autograd.grad(x, list(model.parameters())) for x in (loss, expected))
    norm = sum((g**2).sum() for g in theirs).sqrt()
    error = sum(((a - b) ** 2).sum() for a, b in zip(ours, theirs, strict=True)).sqrt()
    assert error <= 1e-5 * norm


def test_micro_batches_add_up():
    model, made = scalar_model(), rankings()
    whole, _ = batch_loss(model, made, 6)
    parts = [batch_loss(model, made[i : i + 2], 6)[0] for i in (0, 2, 4)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)


def test_a_score_is_read_at_the_last_token():
    model = scalar_model()
    rows = [[1, 2, 3, 257], [4, 257], [5, 6, 7, 8, 9, 257]]
    scores = response_scores(model, rows)
    for row, score in zip(rows, scores, strict=True):
        alone = model(torch.tensor(row), torch.tensor([0, len(row)], dtype=torch.int32))
        torch.testing.assert_close(score, alone[-1], rtol=1e-5, atol=1e-6)


def test_encode_reads_prompt_marker_response_eos(capsys):
    tokenizer = Tokenizer.bytes()
    comparisons = [
        Comparison("a", ("b", "c", "d"), (2.0, 1.0, 1.0), {}),
        Comparison("x", ("y", "z"), (1.0, 1.0), {}),  # nothing but a tie
    ]
    (ranking,) = encode(comparisons, tokenizer, 32, "drop")
    assert ranking.rows[0] == [97, 258, 98, 257]
    assert ranking.pairs == [(1, 0), (2, 0)] and ranking.best == 1
    assert ranking.rows[0][ranking.begin :] == [98, 257]
    assert "1 of 2 prompts have tied responses alone" in capsys.readouterr().out


def test_accuracy_and_its_interval():
    """Wilson's interval: its ends q solve (p − q)² = z² q (1 − q) / n."""

    def wilson(p: float, n: float) -> list[float]:
        a, b, c = 1 + 1.96**2 / n, -2 * p - 1.96**2 / n, p * p
        root = math.sqrt(b * b - 4 * a * c)
        return [(-b - root) / (2 * a), (-b + root) / (2 * a)]

    # 7 of 10 over 5 prompts of 2 pairs: residuals 2 − 1.4 (three times), 1 − 1.4, 0 − 1.4, whose
    # squares add up to 3.2; v = 5 / 4 · 3.2 / 100 = 0.04, as of n = 0.21 / 0.04 pairs.
    p, low, high = accuracy([2, 2, 2, 1, 0], [2] * 5)
    assert (p, low, high) == pytest.approx((0.7, *wilson(0.7, 5.25)))
    # Prompts that agree more than chance would have it prove no more than all pairs do.
    assert accuracy([3, 3], [4, 4]) == pytest.approx((0.75, *wilson(0.75, 8)))
    # All right: as sure as the number of prompts allows, 2 of 2, and never beyond 1.
    assert accuracy([2, 2], [2, 2]) == pytest.approx((1.0, 2 / (2 + 1.96**2), 1.0))
    assert accuracy([0.0], [3]) == pytest.approx((0.0, 0.0, 1.96**2 / (1 + 1.96**2)))


def test_the_interval_holds_what_it_says():
    """Of 400 samples of 40 prompts with 6 dependent pairs each, 95 % hold the true share, 0.8."""
    draw = torch.Generator().manual_seed(0)
    easy = torch.rand(400, 40, 1, generator=draw) < 0.5  # half the prompts at 0.98, half at 0.62
    chance = torch.where(easy, 0.98, 0.62).expand(400, 40, 6)
    right = torch.bernoulli(chance, generator=draw).sum(-1).tolist()
    held = sum(low <= 0.8 <= high for _, low, high in (accuracy(r, [6] * 40) for r in right))
    # 380 expected; a binomial deviation of 4.4 either way, three of them. Pairs taken as
    # independent hold it 331 times.
    assert 366 <= held <= 394


def test_evaluate_counts_every_pair_and_half_of_equal_scores():
    model, made = scalar_model(), rankings()
    figures = evaluate(model, made, batch=4)  # 4 prompts, then the other 2
    right = total = 0.0
    for ranking in made:
        scores = response_scores(model, ranking.rows)
        right += sum(float(scores[i] > scores[j]) for i, j in ranking.pairs)
        total += len(ranking.pairs)
    assert figures["accuracy"] == pytest.approx(right / total)
    assert figures["val_loss"] == pytest.approx(batch_loss(model, made, 6)[0].item(), rel=1e-5)
    with torch.no_grad():
        model.score.zero_()
    assert evaluate(model, made, 4)["accuracy"] == 0.5


@pytest.mark.checklist(28)
def test_it_learns_and_demonstrations_average_zero(tmp_path):
    final = run(config_for(tmp_path, epochs=20))
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["accuracy"] > 0.9 and lines[-1]["val_loss"] < 0.5
    assert lines[-1]["accuracy_low"] <= lines[-1]["accuracy"] <= lines[-1]["accuracy_high"]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=0.3)
    # The best responses of the training prompts: all say yes as often as any, so nearly 0 each.
    model, tokenizer = load(final), Tokenizer.load(final)
    assert model.head == "scalar"
    rows = [
        [*tokenizer.prompt_ids("well 1?"), *tokenizer.encode(answer), tokenizer.eos_id]
        for answer in ("yes yes", "no no")
    ]
    yes, no = response_scores(model, rows).tolist()
    assert yes > no and abs(yes) < 0.5 * (yes - no)


@pytest.mark.checklist(28)
def test_calibration_on_given_demonstrations(tmp_path):
    demonstrations = write_demonstrations(tmp_path / "demonstrations.jsonl")
    final = run(config_for(tmp_path, demonstrations=(str(demonstrations),)))
    model, tokenizer = load(final), Tokenizer.load(final)
    rows = encode_demonstrations(read_demonstrations(demonstrations), tokenizer, 32, "error")
    assert abs(mean_score(model, [ids for ids, _ in rows])) < 1e-5
    assert model.score_bias != 0


@pytest.mark.checklist(27)
def test_head_is_new_and_the_trunk_is_the_base_model(tmp_path, monkeypatch):
    started = {}

    def keep(run_, state, steps):
        started.update({k: v.clone() for k, v in state.models[""].state_dict().items()})
        raise KeyboardInterrupt

    config = config_for(tmp_path)
    monkeypatch.setattr("instructcore.train.Run.start", keep)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    base = load(tmp_path / "base").state_dict()
    assert all(torch.equal(value, base[k]) for k, value in started.items() if k in base)
    assert started["score"].std().item() == pytest.approx(1 / math.sqrt(17), rel=0.6)


def test_chosen_and_rejected_pairs(tmp_path):
    config = config_for(tmp_path, epochs=12)
    pairs = itertools.product("abcdefgh", range(4))
    records = [{"prompt": a * (i + 1), "chosen": "yes", "rejected": "no"} for a, i in pairs]
    write_jsonl(tmp_path / "data.jsonl", records)
    run(config)
    assert read_metrics(tmp_path / "run")[-1]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "missing.jsonl"], "missing.jsonl: No such file"),
        (["--data", "ties.jsonl"], "no comparison to learn from: all of them are ties"),
        (["--data", "one.jsonl"], "one.jsonl:1: the responses must be at least 2 strings"),
        (["--data", "long.jsonl"], "1 of 1 comparisons do not fit the context of 32 tokens"),
        (["--data", "long.jsonl", "--overlong", "error"], "long.jsonl:1: 43 tokens, more than"),
        (["--batch", "100"], "--batch must be at most the 43 prompts to train on, got 100"),
        (["--micro-batch", "3"], "--micro-batch must divide --batch, got 3 and 8"),
        (["--demonstrations", "missing.jsonl"], "missing.jsonl: No such file"),
        (
            ["--demonstrations", "said.jsonl", "--overlong", "error"],
            "said.jsonl:2: 43 tokens",
        ),
        (["--out", "data.jsonl/run"], "--out data.jsonl/run: "),
        (["--out", "/proc/nowhere/run"], "/proc/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "base")
    write_comparisons(tmp_path / "data.jsonl")
    tie = {"prompt": "x", "responses": ["a", "b"], "ranks": [1, 1]}
    write_jsonl(tmp_path / "ties.jsonl", [tie])
    said = [{"prompt": "x", "response": "y" * n} for n in (1, 40)]
    write_jsonl(tmp_path / "said.jsonl", said)
    write_jsonl(tmp_path / "one.jsonl", [{"prompt": "x", "responses": ["a"], "ranks": [1]}])
    write_jsonl(tmp_path / "long.jsonl", [{"prompt": "x", "chosen": "y" * 40, "rejected": "z"}])
    defaults = {"init": "base", "data": "data.jsonl", "out": "run", "batch": "8"}
    assert cli.main(command_line("reward", flags, **defaults)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_directory_in_use_is_left_alone(tmp_path, capsys):
    config = config_for(tmp_path)
    run(config)
    before = files_of(tmp_path)
    flags = ["--init", config.init, "--data", *config.data, "--out", config.run.out]
    assert cli.main(["reward", *flags]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert files_of(tmp_path) == before


def test_overlong_truncate():
    """A response is cut at the context; a prompt that leaves none is left out."""
    tokenizer = Tokenizer.bytes()
    short = [Comparison("a", ("b", "c"), (1.0, 2.0), {})] * 5
    cut = Comparison("a", ("b" * 40, "c"), (1.0, 2.0), {})
    full = Comparison("a" * 40, ("b", "c"), (1.0, 2.0), {})
    found = encode([*short, cut, full], tokenizer, 8, "truncate")
    assert len(found) == 6 and found[-1].rows == [[97, 258, *[98] * 6], [97, 258, 99, 257]]


def test_demonstrations_obey_overlong(tmp_path):
    said = [{"prompt": "x", "response": "y" * n} for n in (1, 40)]
    demonstrations = str(write_jsonl(tmp_path / "said.jsonl", said))
    final = run(config_for(tmp_path, demonstrations=(demonstrations,), overlong="truncate"))
    rows = encode_demonstrations(
        read_demonstrations(demonstrations), Tokenizer.load(final), 32, "truncate"
    )
    assert len(rows) == 2
    assert abs(mean_score(load(final), [ids for ids, _ in rows])) < 1e-5
