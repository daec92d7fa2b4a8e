"""Evaluation: intervals and win rates by hand, samples, judges, KL, and the command's table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from toy_data import command_line

from instructcore import cli, evaluate
from instructcore.data import Prompt
from instructcore.errors import UserError
from instructcore.evaluate import (
    EvalConfig,
    Interval,
    Sample,
    bootstrap_interval,
    make_judge,
    mean_kl,
    paired_bootstrap,
    sample_responses,
    wins,
)
from instructcore.generate import Completion, SamplingParams
from instructcore.model import GPT, ModelConfig
from instructcore.reward import response_scores
from instructcore.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()
CPU = torch.device("cpu")


def model(seed: int = 0, tokenizer: Tokenizer = TOKENIZER) -> GPT:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, context=48, layers=1, heads=2, width=16, mlp_width=32
    )
    m = GPT(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():  # far from uniform, so that models differ
        for p in m.parameters():
            if p.ndim == 2:
                p.mul_(8)
    return m.eval()


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"say {i}", {"number": i}) for i in range(count)]


def sample(text: str, response: str, ended: bool = True) -> Sample:
    ids = TOKENIZER.encode(response) + ([TOKENIZER.eos_id] if ended else [])
    zeros, reason = [0.0] * len(ids), "stop" if ended else "length"
    completion = Completion(ids, zeros, zeros, reason, response)
    return Sample(Prompt(text, {"prompt": text}), TOKENIZER.prompt_ids(text), completion)


# ---- Statistics


def test_bootstrap_interval():
    values = [0.0, 1.0] * 50
    mean, low, high = bootstrap_interval(values, seed=3)
    # The mean of 100 fair coins has the deviation 0.05: ± 1.96 · 0.05 around one half.
    assert mean == 0.5
    assert low == pytest.approx(0.402, abs=0.02) and high == pytest.approx(0.598, abs=0.02)
    assert bootstrap_interval(values, seed=3) == (mean, low, high)
    assert bootstrap_interval([2.0] * 9) == (2.0, 2.0, 2.0)
    assert all(map(math.isnan, bootstrap_interval([])))


def test_paired_bootstrap_sees_what_unpaired_intervals_hide():
    a = [float(i) + 0.1 for i in range(50)]
    b = [float(i) for i in range(50)]
    difference = paired_bootstrap(a, b)
    assert difference.mean == pytest.approx(0.1)
    assert difference.low == pytest.approx(0.1) and difference.high == pytest.approx(0.1)
    assert bootstrap_interval(a).low < bootstrap_interval(b).high
    with pytest.raises(ValueError, match="paired_bootstrap: a and b must be equally long"):
        paired_bootstrap([1.0], [])


def test_wins_count_ties_as_half():
    assert wins([2.0, 1.0, 3.0], [1.0, 2.0, 3.0]) == [1.0, 0.0, 0.5]


# ---- Samples


def test_samples_have_their_own_stream_each():
    """Equal prompts get unequal responses; the seed decides them all; greedy ones are equal."""
    m, same = model(), [Prompt("say", {})] * 4
    params = SamplingParams(max_tokens=6, seed=5)
    m.extra = {"stage": "sft"}
    first = sample_responses(m, TOKENIZER, same, params)
    assert len({tuple(s.completion.token_ids) for s in first}) > 1
    again = sample_responses(m, TOKENIZER, same, params)
    assert [s.sequence for s in again] == [s.sequence for s in first]
    assert first[0].prompt_ids == TOKENIZER.prompt_ids("say")
    assert first[0].sequence == first[0].prompt_ids + first[0].completion.token_ids
    greedy = sample_responses(m, TOKENIZER, same, SamplingParams(max_tokens=6, temperature=0.0))
    assert len({tuple(s.completion.token_ids) for s in greedy}) == 1


def test_a_base_model_reads_no_marker():
    m, params = model(), SamplingParams(max_tokens=2, seed=5)
    raw, marked = TOKENIZER.encode("say 0"), TOKENIZER.prompt_ids("say 0")
    for stage, told, expected in (
        ("pretrain", None, raw), ("sft", None, marked), ("ppo", None, marked),
        ("pretrain", True, marked), ("sft", False, raw),
    ):  # fmt: skip
        m.extra = {"stage": stage}
        (found,) = sample_responses(m, TOKENIZER, prompts(1), params, told)
        assert found.prompt_ids == expected and found.sequence[: len(expected)] == expected


def test_mean_kl_equals_a_plain_computation():
    policy, reference = model(0), model(1)
    samples = sample_responses(policy, TOKENIZER, prompts(5), SamplingParams(max_tokens=4, seed=0))
    total = 0.0
    for s in samples:
        ids = torch.tensor(s.sequence)
        cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
        with torch.no_grad():
            ours, theirs = (m(ids, cu_seqlens).log_softmax(-1) for m in (policy, reference))
        for t in range(len(s.prompt_ids), len(ids)):
            total += float(ours[t - 1, ids[t]] - theirs[t - 1, ids[t]])
    assert mean_kl(policy, reference, samples) == pytest.approx(total / 5, rel=1e-4)
    assert mean_kl(policy, policy, samples) == 0.0
    assert math.isnan(mean_kl(policy, reference, []))


# ---- Judges


def test_function_judge_sees_texts_and_records():
    def judge(prompts, responses, records):
        assert prompts == ["a", "b"] and records == [{"prompt": "a"}, {"prompt": "b"}]
        return [len(r) for r in responses]

    assert make_judge(judge, TOKENIZER, CPU, torch.float32)(
        [sample("a", "xyz"), sample("b", "x")]
    ) == [3.0, 1.0]


def test_judges_say_what_they_need():
    for function, message in (
        (lambda p, r, c: [], "must return a score per response, got 0 for 1"),
        (lambda p, r, c: [None], "must return numbers"),
    ):
        with pytest.raises(UserError, match=message):
            make_judge(function, TOKENIZER, CPU, torch.float32)([sample("a", "b")])
    with pytest.raises(UserError, match="gold knows the quickstart's prompts only"):
        make_judge("gold", TOKENIZER, CPU, torch.float32)([sample("a", "b")])


def test_function_named_on_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text("def f(p, r, records):\n    return [1] * len(p)\n")
    monkeypatch.chdir(tmp_path)
    judge = make_judge("my_reward:f", TOKENIZER, CPU, torch.float32)
    assert judge([sample("a", "b")]) == [1.0]
    for name in ("my_reward:g", "no_module:f", ":f"):
        with pytest.raises(UserError, match=f"cannot load the function {name}"):
            make_judge(name, TOKENIZER, CPU, torch.float32)


@pytest.mark.checklist(7)
def test_reward_model_scores_at_the_last_token(tmp_path):
    """Of prompt, marker, response and its end; the batch and its order do not matter."""
    scorer = model().to_scalar_head()
    scorer.save(tmp_path, TOKENIZER)
    judge = make_judge(str(tmp_path), TOKENIZER, CPU, torch.float32)
    samples = [sample(f"prompt {i}", "word " * (i % 3), ended=i % 2 == 0) for i in range(70)]
    scores = judge(samples)
    for i in (0, 3, 69):
        ids = TOKENIZER.prompt_ids(f"prompt {i}") + TOKENIZER.encode("word " * (i % 3))
        ids += [TOKENIZER.eos_id] if i % 2 == 0 else []
        alone = scorer(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32))[-1]
        assert scores[i] == pytest.approx(alone.item(), abs=1e-5)
    assert judge(samples[::-1])[::-1] == pytest.approx(scores, abs=1e-5)
    # It reads the marker that it was trained with, though the writer, a base model, had none.
    raw = [s._replace(prompt_ids=s.prompt_ids[:-1]) for s in samples]
    assert judge(raw) == pytest.approx(scores, abs=1e-5)


def test_reward_model_with_another_tokenizer_reads_the_text(tmp_path):
    other = Tokenizer.train(["hello there, hello words"] * 20, 270)
    scorer = model(tokenizer=other).to_scalar_head()
    scorer.save(tmp_path, other)
    judge = make_judge(str(tmp_path), TOKENIZER, CPU, torch.float32)
    assert not judge.same_tokens
    ids = other.prompt_ids("hello") + other.encode("hello there") + [other.eos_id]
    with torch.no_grad():
        expected = response_scores(scorer, [ids]).tolist()
    assert judge([sample("hello", "hello there")]) == pytest.approx(expected)


def test_reward_model_rejects_what_it_cannot_read(tmp_path):
    model().to_scalar_head().save(tmp_path / "scalar", TOKENIZER)
    model().save(tmp_path / "lm", TOKENIZER)
    judge = make_judge(str(tmp_path / "scalar"), TOKENIZER, CPU, torch.float32)
    with pytest.raises(UserError, match="must fit the context of 48 tokens of .*scalar, got 54"):
        judge([sample("x" * 50, "yz")])
    with pytest.raises(UserError, match="is no reward model"):
        make_judge(str(tmp_path / "lm"), TOKENIZER, CPU, torch.float32)


# ---- The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("evaluate")
    for seed, name in enumerate(("a", "b")):
        model(seed).save(path / name, TOKENIZER, extra={"stage": "sft"})
    model().save(path / "base", TOKENIZER, extra={"stage": "pretrain"})
    rows = [{"prompt": f"say {i}", "completion": f"what {i}"} for i in range(8)]
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "prompts.txt").write_text("\n".join(f"say {i}" for i in range(8)))
    return path


def spread(prompts, responses, records):
    return [float(sum(map(ord, r)) % 7) for r in responses]


def test_table_and_json(folder, tmp_path, capsys):
    config = EvalConfig(
        checkpoints=(str(folder / "a"), str(folder / "b"), str(folder / "a")),
        data=str(folder / "pairs.jsonl"), max_tokens=6, out=str(tmp_path / "found.json"),
    )  # fmt: skip
    first, second, third = evaluate.run(config, judge=spread)
    assert first["win_rate"] == Interval(0.5, 0.5, 0.5) and "kl" not in first
    assert third["score"] == first["score"] and third["win_rate"].mean == 0.5
    assert third["kl"] == 0.0 and second["kl"] > 0
    assert 0 <= second["eos_rate"] <= 1 and 1 <= second["length"] <= 6
    assert first["loss"] == pytest.approx(plain_loss(TOKENIZER.prompt_ids), rel=1e-4)
    saved = json.loads((tmp_path / "found.json").read_text())
    assert saved["n"] == 8 and saved["rows"][1]["score"]["mean"] == second["score"].mean
    assert "win rate" in capsys.readouterr().out


@pytest.mark.checklist(38)
def test_evaluation_is_greedy(folder, monkeypatch):
    """Unless asked otherwise; but the KL is an expectation, over samples at temperature 1."""
    seen = []

    def look(model, tokenizer, prompts, params):
        seen.append(params.temperature)
        return sample_responses(model, tokenizer, prompts, params)

    monkeypatch.setattr(evaluate, "sample_responses", look)
    names, data = (str(folder / "a"), str(folder / "b")), str(folder / "pairs.jsonl")
    evaluate.run(EvalConfig(checkpoints=names, data=data, max_tokens=3, seed=0), judge=spread)
    assert seen == [0.0, 0.0, 1.0]


def plain_loss(prompt_ids) -> float:
    """Held-out loss: the mean over the responses' tokens, their ends included."""
    total = count = 0.0
    m = model(0)
    for i in range(8):
        ids = prompt_ids(f"say {i}")
        response = TOKENIZER.encode(f"what {i}") + [TOKENIZER.eos_id]
        tokens = torch.tensor(ids + response)
        with torch.no_grad():
            logits = m(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32))
        at = range(len(ids) - 1, len(tokens) - 1)
        total -= sum(float(logits[t].log_softmax(-1)[tokens[t + 1]]) for t in at)
        count += len(at)
    return total / count


def test_the_loss_of_a_base_model_is_without_marker(folder):
    files = {"checkpoints": (str(folder / "base"),), "data": str(folder / "pairs.jsonl")}
    (row,) = evaluate.run(EvalConfig(**files, max_tokens=3, dtype="float32"))
    assert row["loss"] == pytest.approx(plain_loss(TOKENIZER.encode), rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "long.txt"], "long.txt:2: a prompt must be shorter than the context of 48"),
        (["--data", "long.jsonl"], "long.jsonl:2: 58 tokens, more than the context of 48"),
        (["--data", "bad.jsonl"], 'bad.jsonl:2: "completion" must be a string, got 3'),
        (["--data", "fields.jsonl"], 'fields.jsonl:2: the fields "prompt" fit no known format'),
        (["--out", "good.txt/found.json"], "--out good.txt/found.json: there is no such"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_text("one\n")
    (tmp_path / "long.txt").write_text("one\n" + "x" * 48)
    first, good = {"prompt": "one", "completion": "two"}, {"prompt": "three"}
    rows = {"long": {"completion": "x" * 51}, "bad": {"completion": 3}, "fields": {}}
    for name, row in rows.items():
        lines = map(json.dumps, (first, good | row))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    arguments = command_line("eval", flags, data="good.txt", max_tokens="2")
    assert cli.main([arguments[0], str(folder / "a"), *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_messages_without_a_response_are_prompts_alone(folder, tmp_path):
    asked = {"messages": [{"role": "user", "content": "say"}]}
    told = {"messages": [*asked["messages"], {"role": "assistant", "content": "what"}]}
    for record, known in ((asked, False), (told, True)):
        (tmp_path / "chat.jsonl").write_text(json.dumps(record))
        files = {"checkpoints": (str(folder / "a"),), "data": str(tmp_path / "chat.jsonl")}
        (row,) = evaluate.run(EvalConfig(**files, max_tokens=2))
        assert (row["loss"] is not None) == known


def test_without_judge_or_references(folder):
    files = {"checkpoints": (str(folder / "a"),), "data": str(folder / "prompts.txt")}
    (row,) = evaluate.run(EvalConfig(**files, limit=3, max_tokens=3, temperature=1.0))
    assert "score" not in row and row["loss"] is None and row["length"] <= 3


def test_rejects(folder, tmp_path):
    ok = {"checkpoints": (str(folder / "a"),), "data": str(folder / "prompts.txt")}
    (tmp_path / "there.json").write_text("{}")
    model().to_scalar_head().save(tmp_path / "scalar", TOKENIZER)
    for changes, message in (
        ({"checkpoints": ()}, "needs a checkpoint"),
        ({"data": ""}, "--data is missing"),
        ({"max_tokens": 0}, r"--max-tokens must be in \[1, inf\), got 0"),
        ({"out": str(tmp_path / "there.json")}, "there.json exists already"),
        ({"out": str(tmp_path / "no" / "there.json")}, "no such directory"),
        ({"data": str(tmp_path / "none.txt")}, "none.txt"),
        ({"checkpoints": (str(tmp_path / "none"),)}, "no checkpoint at"),
        ({"checkpoints": (str(tmp_path / "scalar"),)}, "is a reward model: it cannot answer"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.run(EvalConfig(**ok | changes))
    assert (tmp_path / "there.json").read_text() == "{}"
