"""Evaluation: intervals and win rates by hand, samples, judges, KL, and the command's table."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from pathlib import Path

import pytest
import torch
from toy_data import command_line, read_metrics

from instructcore import cli, evaluate, ppo, pretrain
from instructcore.config import RunConfig
from instructcore.data import Prompt, read_prompts
from instructcore.errors import UserError
from instructcore.evaluate import (
    EvalConfig,
    Interval,
    Sample,
    bootstrap_interval,
    log_ratios,
    make_judge,
    mean_kl,
    paired_bootstrap,
    sample_responses,
    text_loss,
    wins,
)
from instructcore.generate import Completion, SamplingParams
from instructcore.model import GPT, ModelConfig, load
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


def test_win_rate_and_interval_against_brute_force():
    """All 3^3 resamples of three prompts, each as likely: the bootstrap's own distribution."""
    mine, base = [2.0, 1.0, 3.0], [1.0, 2.0, 3.0]
    each = [1.0 if x > y else 0.5 if x == y else 0.0 for x, y in zip(mine, base, strict=True)]
    means = sorted(sum(d) / 3 for d in itertools.product(each, repeat=3))
    # The 2.5 % quantile is below the lightest resample's 1/27 from either end.
    found = bootstrap_interval(wins(mine, base))
    assert found == (0.5, means[0], means[-1]) == (0.5, 0.0, 1.0)
    # The middle half of 10 prompts' wins, where the quantiles lie inside: exact by the binomial.
    wide = bootstrap_interval(wins([1.0] * 8 + [0.0] * 2, [0.5] * 10))
    chances = [math.comb(10, k) * 0.8**k * 0.2 ** (10 - k) for k in range(11)]
    total = list(itertools.accumulate(chances))
    low, high = (next(k for k in range(11) if total[k] > q) / 10 for q in (0.025, 0.975))
    assert wide == pytest.approx((0.8, low, high))
    # Paired: that every prompt is won is seen, however far the prompts' scores are apart.
    assert bootstrap_interval(wins([1.1, 9.1, 99.1], [1.0, 9.0, 99.0])) == (1.0, 1.0, 1.0)


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


def test_kl_is_that_of_ppo():
    """From the log-probs that rollouts come with and those that the trainer gives the reference."""
    policy, reference = model(0), model(1)
    drawn = sample_responses(policy, TOKENIZER, prompts(5), SamplingParams(max_tokens=4, seed=0))
    episodes = ppo.Episodes.of(drawn, CPU)
    with torch.no_grad():
        ref = ppo.response_logprobs(reference, episodes, 1.0).logprobs
    ratios = (episodes.old_logprobs - ref).double()
    sums = [float(ratios[a:b].sum()) for a, b in itertools.pairwise(episodes.starts)]
    assert log_ratios(policy, reference, drawn) == pytest.approx(sums, rel=1e-6)
    assert mean_kl(policy, reference, drawn) == pytest.approx(sum(sums) / 5, rel=1e-6)


def test_text_loss_is_the_val_loss_of_pretraining(tmp_path):
    """The same tokens in the same windows: here those that pretrain holds out, in a file."""
    text = "".join(random.Random(0).choices("abcd \n", k=1000))
    (tmp_path / "all.txt").write_text(text)
    (tmp_path / "held_out.txt").write_text(text[900:])
    shape = ModelConfig(layers=1, heads=2, width=16, context=48)
    settings = dict(tokenizer="bytes", val_fraction=0.1, steps=2, batch=2, window=16, model=shape)
    final = pretrain.run(
        pretrain.PretrainConfig(
            (str(tmp_path / "all.txt"),),
            **settings,
            run=RunConfig(out=str(tmp_path / "run"), dtype="float32"),
        )
    )
    expected = read_metrics(tmp_path / "run")[-1]["val_loss"]
    held_out = [str(tmp_path / "held_out.txt")]
    trained = load(final)
    assert text_loss(trained, TOKENIZER, held_out, 16)[0] == expected
    assert text_loss(trained, TOKENIZER, held_out, 48)[0] != expected


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
    assert third["kl"] == Interval(0.0, 0.0, 0.0) and second["kl"].low > 0
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


def test_the_alignment_tax_and_another_reference(folder, tmp_path):
    a, b, base = (str(folder / name) for name in ("a", "b", "base"))
    files = {"data": str(folder / "prompts.txt"), "text": (str(folder / "prompts.txt"),)}
    config = EvalConfig((base, b), **files, window=8, reference=a, max_tokens=4, dtype="float32")
    first, second = evaluate.run(config)
    assert first["text_loss"] == text_loss(load(base), TOKENIZER, files["text"], 8)[0]
    assert first["tax"] == 0 and second["tax"] == second["text_loss"] - first["text_loss"] != 0
    assert first["kl"].mean == 0 < second["kl"].mean  # base and a are the same weights
    ours, theirs, draw = load(b).eval(), load(a).eval(), SamplingParams(max_tokens=4, seed=0)
    drawn = sample_responses(ours, TOKENIZER, read_prompts(files["data"]), draw)
    assert second["kl"].mean == pytest.approx(mean_kl(ours, theirs, drawn))  # at temperature 1
    # Another tokenizer reads other tokens: their losses cannot be compared, nor a KL taken.
    other = Tokenizer.train(["say 1\nsay 2\n"] * 20, 262)
    model(tokenizer=other).save(tmp_path / "other", other)
    config = EvalConfig((a, str(tmp_path / "other")), **files, max_tokens=2)
    _, row = evaluate.run(config)
    assert row["tax"] is None and row["text_loss"] > 0 and "kl" not in row


def test_command_line(folder, tmp_path, monkeypatch, capsys):
    """Toy models from the command line to the table and the file, judged by a reward model."""
    monkeypatch.chdir(tmp_path)
    model().to_scalar_head().save(tmp_path / "reward", TOKENIZER)
    flags = ["--data", str(folder / "pairs.jsonl"), "--judge", "reward", "--max-tokens", "4"]
    flags += ["--text", str(folder / "prompts.txt"), "--out", "found.json", "--dtype", "float32"]
    assert cli.main(["eval", str(folder / "a"), str(folder / "b"), *flags]) == 0
    assert set(os.listdir()) == {"reward", "found.json"}  # nothing half written
    printed = capsys.readouterr().out
    for word in ("score", "win", "eos", "length", "loss", "tax", "kl", "95 % intervals"):
        assert word in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["temperature"] == 0 and found["judge"] == "reward" and found["n"] == 8
    first, second = found["rows"]
    assert first["win_rate"]["mean"] == 0.5 and first["tax"] == 0 and "kl" not in first
    judge = make_judge("reward", TOKENIZER, CPU, torch.float32)
    greedy = SamplingParams(max_tokens=4, temperature=0.0)
    said = []
    for name in ("a", "b"):
        m = load(folder / name).eval()
        said.append(judge(sample_responses(m, TOKENIZER, read_prompts(flags[1]), greedy)))
    assert second["score"]["mean"] == pytest.approx(sum(said[1]) / 8, rel=1e-4)
    assert second["win_rate"]["mean"] == sum(wins(said[1], said[0])) / 8
    assert second["kl"]["low"] <= second["kl"]["mean"] <= second["kl"]["high"]


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
        assert ("loss" in row) == known


def test_without_judge_or_references(folder):
    files = {"checkpoints": (str(folder / "a"),), "data": str(folder / "prompts.txt")}
    (row,) = evaluate.run(EvalConfig(**files, limit=3, max_tokens=3, temperature=1.0))
    assert not {"score", "loss", "text_loss", "kl"} & row.keys() and row["length"] <= 3


def test_rejects(folder, tmp_path):
    ok = {"checkpoints": (str(folder / "a"),), "data": str(folder / "prompts.txt")}
    (tmp_path / "there.json").write_text("{}")
    files = ok["data"]
    model().to_scalar_head().save(tmp_path / "scalar", TOKENIZER)
    other = Tokenizer.train(["hello there, hello words"] * 20, 270)
    model(tokenizer=other).save(tmp_path / "other", other)
    for changes, message in (
        ({"checkpoints": ()}, "needs a checkpoint"),
        ({"data": ""}, "--data is missing"),
        ({"window": 8}, "--window needs --text"),
        ({"text": (files,), "window": 49}, "--window must fit the context 48 of .*a, got 49"),
        ({"text": (str(tmp_path / "none.txt"),)}, "none.txt"),
        ({"reference": str(tmp_path / "none")}, "no checkpoint at"),
        ({"reference": str(tmp_path / "scalar")}, "is a reward model: it cannot answer"),
        ({"reference": str(tmp_path / "other")}, "no KL: .*a has other tokens than .*other"),
        ({"judge": "json:nothing"}, "cannot load the function json:nothing"),
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
    with pytest.raises(UserError, match="the judge's scores must be finite"):
        evaluate.run(EvalConfig(**ok), lambda p, r, c: [math.nan] * len(p))
