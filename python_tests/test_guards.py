"""Guard rails: every alarm on a series of its own, and runs that an alarm stops."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_data import (
    WORDS,
    files_of,
    read_metrics,
    save_model,
    write_demonstrations,
    write_jsonl,
)

from instructcore import guards, ppo, report, sft
from instructcore.config import OptimConfig, RunConfig
from instructcore.errors import UserError
from instructcore.guards import SIGNALS, Alarms, GuardConfig
from instructcore.ppo import PPO, PPOConfig
from instructcore.train import WALL_CLOCK, newest_checkpoint

# An iteration of a run in good order; objective/entropy, 8 nats per response, is H0.
HEALTHY = {"kl": 0.1, "length": 20.0, "eos": 0.9, "entropy": 0.4, "surprise": 8.0}


def watch(series: dict[str, list[float]], steps: int = 40, **settings) -> Alarms:
    """The alarms after iterations whose signals are healthy, but for those of `series`."""
    alarms = Alarms(GuardConfig(**settings), {})
    for step in range(steps):
        now = HEALTHY | {name: values[step] for name, values in series.items()}
        alarms.observe(step + 1, {SIGNALS[name]: value for name, value in now.items()})
    return alarms


def turn(before: float, after: float, at: int = 20) -> list[float]:
    """`at` iterations of one value, then of another."""
    return [before] * at + [after] * (40 - at)


# ---- The alarms, by hand


@pytest.mark.parametrize(
    ("name", "series", "limit", "step"),
    [
        # The mean over 5 iterations passes 0.5 · 8 nats with the 4th of 5: 0.1 + 0.8 · 4.9 = 4.02
        ("kl", turn(0.1, 5.0), 0.5, 24),
        # 20 tokens become 40 once all 5 have 41: (20 + 4 · 41) / 5 is 36.8
        ("length", turn(20, 41), 2.0, 25),
        ("length", turn(20, 9), 2.0, 25),
        # 0.9 falls by 0.2 with the 3rd of 5 at 0.5
        ("eos", turn(0.9, 0.5), 0.2, 23),
        # a quarter of 0.4 with the 4th of 5 at 0.02: 0.08 + 0.8 · 0.02 = 0.096
        ("entropy", turn(0.4, 0.02), 0.25, 24),
    ],
)
def test_each_alarm_is_raised_at_its_step(name, series, limit, step, capsys):
    assert getattr(GuardConfig(), f"guard_{name}") == limit  # the default
    assert watch({name: series}).memory["alarms"] == {name: step}
    said = capsys.readouterr().out
    assert said.startswith(f"ppo: ALARM after step {step}: {SIGNALS[name]} is ")
    assert f"(--guard-{name} {limit:g})" in said and said.count("\n") == 1  # said once
    assert watch({name: series}, **{f"guard_{name}": 0.0}).memory["alarms"] == {}


def test_a_healthy_run_raises_none(capsys):
    """Signals that wander by a third and drift as they do when the policy learns."""
    draw = torch.Generator().manual_seed(0)
    noise = (0.67 + 0.66 * torch.rand(5, 40, generator=draw)).tolist()
    drift = {"kl": (0.0, 2.5), "length": (20, 25), "eos": (0.7, 0.75), "entropy": (0.4, 0.3)}
    drift["surprise"] = (8.0, 7.0)
    series = {
        name: [(a + (b - a) * i / 40) * noise[k][i] for i in range(40)]
        for k, (name, (a, b)) in enumerate(drift.items())
    }
    assert watch(series).memory["alarms"] == {}
    # One odd iteration is none either, where five of them are.
    for width, found in ((1, {}), (5, {"length": 24})):
        odd = [60.0 if 20 <= i < 20 + width else 20.0 for i in range(40)]
        assert watch({"length": odd}, guard_length=2.5).memory["alarms"] == found
    assert capsys.readouterr().out.count("ALARM") == 1


def test_levels_are_shares_of_the_threshold():
    now = HEALTHY | {"kl": 1.0, "length": 20 * 2**0.5, "eos": 0.85, "entropy": 0.2}
    alarms = Alarms(GuardConfig(guard_window=1), {})
    first, then = ({SIGNALS[n]: v for n, v in row.items()} for row in (HEALTHY, now))
    assert alarms.observe(1, first) == {}
    expected = {"kl": 1 / 4, "length": 1 / 2, "eos": 1 / 4, "entropy": 1 / 2}
    assert alarms.observe(2, then) == pytest.approx(expected)


def test_the_first_iterations_count_together():
    """Five of mean length 20 are the measure; there is no level before they are done."""
    alarms, lengths = Alarms(GuardConfig(), {}), [12.0, 16.0, 20.0, 24.0, 28.0, 37.0]
    rows = [HEALTHY | {"length": length} for length in lengths]
    found = [alarms.observe(1, {SIGNALS[n]: v for n, v in row.items()}) for row in rows]
    assert found[:5] == [{}] * 5
    assert found[5]["length"] == pytest.approx(math.log(25 / 20) / math.log(2))


def test_held_out_scores_against_the_best_by_hand():
    alarms = Alarms(GuardConfig(guard_drop=3.0), {})
    best = [1.0, 2.0, 3.0, 6.0]
    assert alarms.compare(0, best) == (0.0, True)
    # Falls 1, 0, 1, 2: mean 1, deviation √(2/3), standard error √(2/3) / 2, three of them 1.2247
    level, is_best = alarms.compare(10, [0.0, 2.0, 2.0, 4.0])
    assert level == pytest.approx(1 / (3 * math.sqrt(2 / 3) / 2)) and not is_best
    assert alarms.memory["alarms"] == {} and alarms.memory["best"]["step"] == 0
    # Falls 1, 1, 1, 2: mean 1.25, standard error 1/4: five of them.
    level, _ = alarms.compare(20, [0.0, 1.0, 2.0, 4.0])
    assert level == pytest.approx(5 / 3) and alarms.memory["alarms"] == {"score": 20}
    assert alarms.compare(30, [9.0] * 4) == (0.0, True)
    assert alarms.memory["best"] == {"step": 30, "scores": [9.0] * 4}
    # The same fall everywhere is beyond doubt.
    assert alarms.compare(40, [8.9] * 4)[0] > 1
    assert Alarms(GuardConfig(guard_drop=0), {"best": {"step": 0, "scores": best}}).compare(
        5, [0.0] * 4
    ) == (0.0, False)


def test_memory_is_json_and_all_there_is():
    whole, cut = Alarms(GuardConfig(), {}), Alarms(GuardConfig(), {})
    for step in range(40):
        cut = Alarms(GuardConfig(), json.loads(json.dumps(cut.memory)))
        now = HEALTHY | {"length": 20.0 + step}
        metrics = {SIGNALS[n]: v for n, v in now.items()}
        assert cut.observe(step, metrics) == whole.observe(step, metrics)
        scores = [math.sin(step), 1.0]
        assert cut.compare(step, scores) == whole.compare(step, scores)
    assert cut.memory == whole.memory and cut.memory["alarms"]


# ---- Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A policy that has learnt to answer in one short word, and prompts."""
    path = tmp_path_factory.mktemp("guards")
    save_model(path / "base", context=40)
    data = (str(write_demonstrations(path / "pairs.jsonl", n=64)),)
    run = RunConfig(out=str(path / "sft"), dtype="float32", save_every=0)
    optim = OptimConfig(lr=1e-2)
    sft.run(sft.SFTConfig(str(path / "base"), data, epochs=12, batch=8, optim=optim, run=run))
    write_jsonl(path / "prompts.jsonl", [{"prompt": f"say {word}"} for word in WORDS])
    held_out = [{"prompt": f"tell {word}"} for word in WORDS]
    write_jsonl(path / "held_out.jsonl", held_out)
    return path


def longer(prompts, responses, records):
    """A reward for mere length."""
    return [len(response) / 4 for response in responses]


def shorter(prompts, responses, records):
    """What length does not please."""
    return [-len(response) / 4 for response in responses]


def settings(folder: Path, out: Path, resume: bool = False, **guard) -> PPOConfig:
    return PPOConfig(
        init=str(folder / "sft"),
        reward="test_guards:longer",
        prompts=(str(folder / "prompts.jsonl"),),
        steps=14,
        batch=32,
        minibatch=16,
        max_tokens=16,
        kl_coef=0.0,
        missing_eos="none",
        critic_lr=1e-2,
        optim=OptimConfig(lr=5e-3, schedule="constant", warmup=2, weight_decay=0.0),
        guard=GuardConfig(
            **{"guard_window": 2, "guard_every": 1, "guard_kl": 0.0, "guard_eos": 0.0} | guard
        ),
        run=RunConfig(out=str(out), dtype="float32", save_every=2, log_every=1, resume=resume),
    )


def metrics_of(run: Path) -> list[dict]:
    return [{k: v for k, v in m.items() if k not in WALL_CLOCK} for m in read_metrics(run)]


def trainer(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state" / "trainer.json").read_text())


@pytest.fixture(scope="module")
def stopped(folder, tmp_path_factory) -> Path:
    """A run that rewards length, and was stopped for it."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    ppo.run(settings(folder, out, guard="stop", guard_length=1.5))
    return out


def test_a_length_hacking_run_stops_at_the_last_healthy_checkpoint(stopped):
    metrics = read_metrics(stopped)
    alarm, last = trainer(stopped / "final")["extra"]["guard"]["alarms"], metrics[-1]
    assert alarm == {"length": last["step"]} and 2 < last["step"] < 14
    assert last["guard/length"] >= 1 and last["guard/alarms"] == 1
    assert all(m.get("guard/length", 0) < 1 and m["guard/alarms"] == 0 for m in metrics[:-1])
    # What it was at is kept, and final/ is the iteration before: weights, critic and step.
    assert (stopped / "checkpoints" / f"step-{last['step']}").is_dir()
    assert trainer(stopped / "final")["step"] == last["step"] - 1
    weights = {n: b for n, b in files_of(stopped / "final").items() if n.endswith(".safetensors")}
    assert len(weights) >= 4
    assert weights == {n: files_of(stopped / "best")[n] for n in weights}
    assert newest_checkpoint(stopped) == stopped / "final"


def test_a_warning_changes_nothing(folder, stopped, tmp_path, capsys):
    ppo.run(replace(settings(folder, tmp_path / "run", guard_length=1.5), steps=14))
    assert capsys.readouterr().out.count("ALARM") >= 1
    metrics = metrics_of(tmp_path / "run")
    assert len(metrics) == 14 and not (tmp_path / "run" / "best").exists()
    assert metrics[: len(metrics_of(stopped))] == metrics_of(stopped)
    assert metrics[-1]["guard/alarms"] >= 1


def test_the_best_held_out_score_becomes_final(folder, tmp_path):
    out = tmp_path / "run"
    guard = dict(guard_reward="test_guards:shorter", held_out=(str(folder / "held_out.jsonl"),))
    ppo.run(settings(folder, out, guard="stop", guard_length=0.0,
                     guard_entropy=0.0, **guard))  # fmt: skip
    metrics = read_metrics(out)
    scores = {m["step"]: m["guard/held_out"] for m in metrics}
    assert list(scores) == list(range(len(metrics))) and len(metrics) < 14
    best = max(scores, key=lambda step: scores[step])
    final = trainer(out / "final")
    assert final["step"] == best and final["extra"]["guard"]["best"]["step"] == best
    assert final["extra"]["guard"]["alarms"] == {"score": metrics[-1]["step"]}
    assert metrics[-1]["guard/score"] >= 1
    # Its scores are those of greedy answers to the held-out prompts.
    shown = [json.loads(line) for line in (out / "samples.jsonl").open()]
    first = [row for row in shown if row["step"] == 0]
    assert [row["prompt"] for row in first] == [f"tell {word}" for word in WORDS]
    assert scores[0] == pytest.approx(sum(-len(r["response"]) / 4 for r in first) / len(first))
    assert all(row["held_out"] and row["score"] == len(row["response"]) / 4 for row in shown)


class Killed(Exception):
    pass


@pytest.mark.parametrize("when", [3, "at the end"])
def test_a_resumed_run_remembers(folder, stopped, tmp_path, when):
    """Killed before the alarm, or after it but before final/: the same end, to the bit."""
    out, iteration = tmp_path / "run", PPO.iteration
    guard = dict(guard="stop", guard_length=1.5)

    def killed(self, *args):
        if when != 3:
            raise Killed
        if args == (3,):
            (out / "samples.jsonl").open("a").write('{"step": 4, "prompt": "of a run cut short"}\n')
            raise Killed
        return iteration(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*((PPO, "iteration") if when == 3 else (guards.Guard, "restore")), killed)
        with pytest.raises(Killed):
            ppo.run(settings(folder, out, **guard))
    ppo.run(settings(folder, out, resume=True, **guard))
    ours, theirs = (files_of(run / "final") for run in (out, stopped))
    ours, theirs = ({n: b for n, b in f.items() if "state" not in n} for f in (ours, theirs))
    assert ours == theirs
    assert trainer(out / "final")["extra"] == trainer(stopped / "final")["extra"]
    assert metrics_of(out) == metrics_of(stopped)
    assert (out / "samples.jsonl").read_bytes() == (stopped / "samples.jsonl").read_bytes()


def test_samples_as_training_goes(stopped, folder):
    """Greedy, before the first iteration and at every checkpoint's, of the first prompts."""
    rows = [json.loads(line) for line in (stopped / "samples.jsonl").open()]
    last = read_metrics(stopped)[-1]["step"]
    assert sorted({row["step"] for row in rows}) == [0, *range(2, last + 1, 2)]
    assert [r["prompt"] for r in rows if r["step"] == 2] == [f"say {word}" for word in WORDS]
    assert not any(row["held_out"] for row in rows)
    assert {type(row["ended"]) for row in rows} == {bool}
    length = {s: sum(len(r["response"]) for r in rows if r["step"] == s) for s in (0, 2)}
    assert length[0] > 0


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ({"guard": "never"}, "--guard must be one of warn, stop"),
        ({"guard_length": 0.5}, r"--guard-length must be 0 or above 1, got 0.5"),
        ({"guard_entropy": 1.0}, r"--guard-entropy must be in \[0, 1\), got 1"),
        ({"guard_reward": "test_guards:longer"}, "--guard-reward needs --held-out"),
        ({"held_out": ("none.jsonl",)}, "none.jsonl"),
        ({"held_out": ("prompts.jsonl",)}, "--held-out: 6 of its 6 prompts are in --prompts"),
        ({"guard_reward": "json:no", "held_out": ("held_out.jsonl",)}, "cannot load the function"),
        ({"guard_reward": "json:loads", "held_out": ("one.txt",)}, "at least 2 prompts, got 1"),
    ],
)
def test_rejects(folder, tmp_path, monkeypatch, guard, message):
    monkeypatch.chdir(folder)
    (folder / "one.txt").write_text("one\n")
    with pytest.raises(UserError, match=message):
        ppo.run(settings(folder, tmp_path / "run", **guard))
    assert not (tmp_path / "run").exists()


def test_a_held_out_score_that_is_not_finite(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("test_guards.shorter", lambda p, r, c: [math.nan] * len(p))
    guard = dict(guard_reward="test_guards:shorter", held_out=(str(folder / "held_out.jsonl"),))
    with pytest.raises(UserError, match="the scores of --guard-reward must be finite"):
        ppo.run(settings(folder, tmp_path / "run", **guard))


# ---- The report of a run


def test_report_of_a_run(stopped):
    page = (stopped / "report.html").read_text(encoding="utf-8")
    step = trainer(stopped / "final")["step"]
    assert f"The final checkpoint is that of step {step}. Alarms: length after step" in page
    assert page.count("data:image/png;base64,") == 2 and "http" not in page.replace("/html", "")
    for row in (json.loads(line) for line in (stopped / "samples.jsonl").open()):
        assert html.escape(f"{row['response']}") in page and f"[{row['score']:.3g}]" in page
    assert "say red" in page and "(trained on)" in page and "guard_length" in page


def test_report_shows_the_reward_against_root_kl(monkeypatch):
    """What is plotted: a point a logged step, at √KL, and nothing where a figure is missing."""
    plotted = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.plot", lambda self, x, y, *a, **k: plotted.append((x, y))
    )
    metrics = [
        {"step": 0, "guard/held_out": 5.0},  # before the first iteration there is no KL
        {"step": 1, "objective/kl": -0.01, "objective/score": 1.0},
        {"step": 2, "objective/kl": 4.0, "objective/score": None},
        {"step": 3, "objective/kl": 9.0, "objective/score": 2.0, "guard/held_out": 3.0},
    ]
    report._frontier(metrics)
    assert plotted == [((0.0, 3.0), (1.0, 2.0)), ((3.0,), (3.0,))]
    plotted.clear()
    report._curves(metrics, {})
    assert plotted[0] == ((1, 3), (1.0, 2.0)) and plotted[-1] == ((0, 3), (5.0, 3.0))


def test_report_picks_steps_from_first_to_last():
    row = {"prompt": "a<b", "response": "é", "score": 0.5, "ended": False, "held_out": True}
    table = report._samples_over_training([row | {"step": step} for step in range(0, 90, 10)])
    assert [int(s) for s in re.findall(r"<th>step (\d+)", table)] == [0, 20, 40, 60, 80]
    assert "a&lt;b" in table and "é …\n[0.5]" in table and "trained on" not in table


def test_events_have_the_papers_names(stopped):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(stopped / "tensorboard"))
    events.Reload()
    names = {"objective/score", "objective/kl", "ppo/clip_fraction", "rollout/eos_rate", "ppo/lr"}
    assert names | {"guard/length", "guard/alarms"} <= set(events.Tags()["scalars"])
