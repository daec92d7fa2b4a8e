"""The quickstart from raw text to its report, with the work cut to seconds."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from toy_data import files_of

from instructcore import ppo, quickstart, quickstart_data
from instructcore.cli import main
from instructcore.quickstart import QuickstartConfig
from instructcore.train import is_complete

# Sizes that leave every stage something to do; the files keep their order, so all families occur.
ROWS = {"pretrain": 800, "demonstrations": 400, "preference_prompts": 60, "ppo_prompts": 60}
ROWS |= {"eval_prompts": 40, "samples": 4}


@pytest.fixture(scope="module")
def small():
    """The recipe and the data, made small."""
    recipe, build = quickstart.recipe, quickstart_data.build

    def small_recipe(*arguments):
        plan = recipe(*arguments)
        shape = replace(plan.pretrain.model, layers=1, width=32, heads=2)
        return quickstart.Recipe(
            replace(plan.pretrain, steps=30, batch=4, model=shape),
            replace(plan.sft, epochs=2),
            replace(plan.reward, epochs=1, batch=4),
            replace(
                plan.ppo, steps=2, batch=8, minibatch=4, run=replace(plan.ppo.run, save_every=1)
            ),
        )

    def small_build(seed=0):
        data = build(seed)
        rows = {f.name: getattr(data, f.name) for f in fields(data)}
        return replace(data, **{name: rows[name][:count] for name, count in ROWS.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "recipe", small_recipe)
        patch.setattr(quickstart_data, "build", small_build)
        # So little training gives no right answer: grade by length, so that not all pairs are ties.
        patch.setattr(quickstart_data, "gold", lambda task, response, ended: len(response) % 7 / 6)
        yield


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A finished quickstart."""
    return quickstart.run(QuickstartConfig(out=str(tmp_path_factory.mktemp("run") / "q")))


def test_every_stage_leaves_a_checkpoint(finished):
    for stage in ("pretrain", "sft", "reward", "ppo"):
        assert is_complete(finished / stage / "final")
        assert (finished / stage / "metrics.jsonl").read_text(encoding="utf-8")
    assert (finished / "ppo" / "critic" / "model.safetensors").exists()


def test_summary_and_report(finished):
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    for name in ("pretrain_loss", "sft_loss", "reward_accuracy", "kl", "seconds"):
        assert isinstance(summary[name], float), name
    assert summary["seed"] == 0 and summary["n_eval"] == ROWS["eval_prompts"]
    assert 0 <= summary["win_rate_ppo_over_sft"] <= 1
    assert set(summary["gold_reward"]) == {"constant", "base", "sft", "ppo"}
    assert set(summary["gold_reward_ci"]) == {"base", "sft", "ppo", "ppo_minus_sft"}
    assert set(summary["seconds_by_stage"]) == {
        "data", "pretrain", "sft", "sampling", "reward", "ppo", "evaluation"
    }  # fmt: skip
    assert set(summary["versions"]) >= {"instructcore", "torch", "python"}
    report = (finished / "report.html").read_text(encoding="utf-8")
    assert "写一篇关于人工智能的文章。" in report
    assert "http://" not in report.replace("http://www.w3.org", "")  # nothing is fetched


def test_training_files_and_evaluation_share_no_prompt(finished):
    def prompts(name):
        lines = (finished / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return {json.loads(line)["prompt"] for line in lines}

    held_out = prompts("eval_prompts")
    for name in ("demonstrations", "preference_prompts", "ppo_prompts", "comparisons"):
        assert not held_out & prompts(name), name


def test_the_directory_serves_other_commands(finished, tmp_path, capsys):
    """generate takes a quickstart's directory as its PPO policy."""
    out = tmp_path / "answers.jsonl"
    prompts = str(finished / "data" / "samples.jsonl")
    flags = ["--max-tokens", "4", "--device", "cpu", "--out", str(out)]
    assert main(["generate", str(finished), "--prompts", prompts, *flags]) == 0
    assert len(out.read_text(encoding="utf-8").splitlines()) == ROWS["samples"]


def test_same_seed_same_bits_and_shuffled_labels_differ(small, finished, tmp_path):
    again = quickstart.run(QuickstartConfig(out=str(tmp_path / "again")))
    control = quickstart.run(QuickstartConfig(out=str(tmp_path / "control"), shuffle_labels=True))
    weights = "ppo/final/model.safetensors"
    assert (again / weights).read_bytes() == (finished / weights).read_bytes()
    assert (control / weights).read_bytes() != (finished / weights).read_bytes()
    ranks = [
        [json.loads(line)["ranks"] for line in (run / "data" / "comparisons.jsonl").open()]
        for run in (finished, control)
    ]
    assert ranks[0] != ranks[1]
    assert [sorted(r) for r in ranks[0]] == [sorted(r) for r in ranks[1]]


def test_a_stopped_quickstart_resumes_to_the_same_bits(small, finished, tmp_path):
    out, iteration = tmp_path / "stopped", ppo.PPO.iteration

    def stopped_at_step_1(self, step):
        if step == 1:
            raise KeyboardInterrupt
        return iteration(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.PPO, "iteration", stopped_at_step_1)
        with pytest.raises(KeyboardInterrupt):
            quickstart.run(QuickstartConfig(out=str(out)))
    assert not (out / "summary.json").exists()
    quickstart.run(QuickstartConfig(out=str(out), resume=True))
    for weights in ("sft/final/model.safetensors", "ppo/critic/model.safetensors"):
        assert (out / weights).read_bytes() == (finished / weights).read_bytes()
    before = files_of(out)
    assert main(["quickstart", "--out", str(out), "--resume", "--seed", "5"]) == 2
    assert files_of(out) == before


def test_a_directory_in_use_is_refused(finished, capsys):
    before = (finished / "summary.json").read_bytes()
    assert main(["quickstart", "--out", str(finished)]) == 2
    assert "choose another directory" in capsys.readouterr().err
    assert (finished / "summary.json").read_bytes() == before
