"""Labelling: what may be typed, what is kept when anything stops, and who can read it."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
from toy_data import command_line, save_model, write_jsonl

from instructcore import cli, reward
from instructcore.config import OptimConfig, RunConfig
from instructcore.data import read_comparisons
from instructcore.errors import UserError
from instructcore.generate import Completion, SamplingParams
from instructcore.label import FLAGS, LabelConfig, parse_flags, parse_ranking, run
from instructcore.tokenizer import Tokenizer

PROMPTS = ["say red", "写一首诗", "say [bold]blue[/bold]"]


@pytest.fixture
def label(tmp_path, monkeypatch):
    """label(typed, ...): a session whose labeler types these lines; how many prompts it ranked."""
    save_model(tmp_path / "base")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])

    def session(typed="", name="out.jsonl", **settings):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        config = LabelConfig(
            str(tmp_path / "base"),
            str(tmp_path / "prompts.jsonl"),
            out=str(tmp_path / name),
            **({"k": 3, "sampling": SamplingParams(max_tokens=6)} | settings),
        )
        return run(config)

    return session


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def spoken(monkeypatch):
    """The answers are "sample 0", "sample 1", ..., in the order that they are drawn; the seeds."""
    seeds = []

    def generate(self, prompts, params):
        seeds.append(params.seed)
        return [Completion([257], [0.0], [0.0], "stop", f"sample {i}") for i in range(params.n)]

    monkeypatch.setattr("instructcore.label.Generator.generate", generate)
    return seeds


@pytest.mark.parametrize(
    ("line", "ranks"),
    [
        ("2>1=3>4", [2, 1, 2, 3]),
        (" 2 > 1 = 3 > 4 ", [2, 1, 2, 3]),
        ("2 1=3 4", [2, 1, 2, 3]),
        ("4 3 2 1", [4, 3, 2, 1]),
        ("1=2=3=4", [1, 1, 1, 1]),
    ],
)
def test_parse_ranking(line, ranks):
    assert parse_ranking(line, 4) == ranks


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "an answer is a number from 1 to 4, got ''"),
        ("2>1=3", "answer 4 is missing"),
        ("2", "answer 1 and 3 and 4 is missing"),
        ("2>1=3>4>2", "answer 2 is there twice"),
        ("2>1=3>5", "an answer is a number from 1 to 4, got '5'"),
        ("0>1>2>3>4", "got '0'"),
        ("2>>1=3>4", "got ''"),
        ("2<1=3>4", "got '2<1'"),
        ("2134", "got '2134'"),
        ("²>1>3>4", "got '²'"),
    ],
)
def test_parse_ranking_says_what_is_wrong(line, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_ranking(line, 4)


def test_parse_flags():
    assert len(FLAGS) == 11
    assert parse_flags("") == []
    assert parse_flags("3, 1 3") == ["fails the instruction", "hallucination"]
    with pytest.raises(UserError, match="a flag is a number from 1 to 11, got '12'"):
        parse_flags("1 12")


def test_ranks_belong_to_the_answers_shown(label, spoken, tmp_path, capsys):
    """Shown shuffled and numbered anew; kept in the order they were drawn, with all labels."""
    typed = "".join(f"{g}\n{f}\n" for g, f in [(7, ""), (1, "1 3"), (4, "11")]) + "1>3=2\n"
    assert label(typed * 3, likert=True, flags=True) == 3
    printed = capsys.readouterr().out
    orders = set()
    shown = re.findall(r"sample (\d)", printed)
    for i, record in enumerate(lines(tmp_path / "out.jsonl")):
        order = [int(x) for x in shown[3 * i : 3 * i + 3]]
        orders.add(tuple(order))
        assert record["responses"] == ["sample 0", "sample 1", "sample 2"]
        assert [record["ranks"][j] for j in order] == [1, 2, 2]
        assert [record["likert"][j] for j in order] == [7, 1, 4]
        flags = [[], ["fails the instruction", "hallucination"], ["expresses moral judgment"]]
        assert [record["flags"][j] for j in order] == flags
        assert (record["prompt"], record["labeler"], record["seed"]) == (PROMPTS[i], "anonymous", 0)
    assert len(orders) > 1 and len(set(spoken)) == 3
    assert "写一首诗" in printed and "[bold]blue[/bold]" in printed


def test_a_mistyped_line_is_asked_again_and_nothing_is_lost(label, tmp_path, capsys):
    typed = ["8", "5", "2", "x", "3", "1>2", "１＞２＝３"]
    assert label("\n".join([*typed, "q"]), likert=True) == 1
    (record,) = lines(tmp_path / "out.jsonl")
    assert sorted(record["likert"]) == [2, 3, 5] and sorted(record["ranks"]) == [1, 2, 2]
    printed = capsys.readouterr().out
    for message in ("1 to 7, got '8'", "1 to 7, got 'x'", "answer 3 is missing"):
        assert message in printed
    assert "1 rankings added" in printed and "2 prompts are left" in printed


def test_skip_quit_and_going_on(label, tmp_path):
    assert label("s\n2 1 3\nq\n") == 1
    assert [r["prompt"] for r in lines(tmp_path / "out.jsonl")] == PROMPTS[1:2]
    assert label("3 2 1\n") == 1  # the one skipped; then the input ends
    assert label("1 2 3\n1 2 3\n") == 1
    assert label("1 2 3\n") == 0
    records = lines(tmp_path / "out.jsonl")
    assert [r["prompt"] for r in records] == [PROMPTS[1], PROMPTS[0], PROMPTS[2]]
    # Another labeler sees the same answers, in the same file.
    assert label("1 2 3\n" * 3, labeler="李") == 3
    others = lines(tmp_path / "out.jsonl")[3:]
    assert [r["labeler"] for r in others] == ["李"] * 3
    assert {r["prompt"]: r["responses"] for r in records} == {
        r["prompt"]: r["responses"] for r in others
    }


def test_answers_depend_on_seed_and_prompt_alone(label, tmp_path):
    def session(name, **settings):
        label("1 2 3\n" * 3, name=name, **settings)
        return {r.pop("prompt"): r for r in lines(tmp_path / name)}

    one = session("one.jsonl")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": x} for x in PROMPTS[::-1] + PROMPTS[:1]])
    assert session("two.jsonl") == one  # in another order; a prompt that comes twice is asked once
    other = session("three.jsonl", seed=1)
    assert all(other[p]["responses"] != one[p]["responses"] for p in PROMPTS)


def test_each_line_is_on_the_disk_before_the_next_prompt(label, tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor):
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr("instructcore.label.os.fsync", fsync)
    label("1 2 3\n" * 3)
    ends = [m.end() for m in re.finditer(b"\n", (tmp_path / "out.jsonl").read_bytes())]
    assert synced == ends and len(ends) == 3


def test_half_a_line_is_dropped(label, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    label("1 2 3\n" * 3)
    whole = out.read_bytes()
    last = len(whole) - len(whole.rstrip(b"\n").rpartition(b"\n")[2]) - 1
    for kept in (last + 1, last + 5, last + 40, len(whole) - 2):
        out.write_bytes(whole[:kept])
        assert label("1 2 3\n") == 1
        assert "was cut short and is dropped" in capsys.readouterr().out
        assert out.read_bytes() == whole
    out.write_bytes(whole[:-1])  # all of it but the line end: kept
    assert label("1 2 3\n") == 0 and out.read_bytes() == whole
    assert "cut short" not in capsys.readouterr().out


def test_prompts_that_a_terminal_or_utf8_cannot_take(label, tmp_path, capsys):
    text = "a\x1b[2Jb\x07 \ud800"
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
    assert label("1 2 3\n") == 1 and label("1 2 3\n") == 0
    assert lines(tmp_path / "out.jsonl")[0]["prompt"] == text
    printed = capsys.readouterr().out
    assert "a\ufffd[2Jb\ufffd \ufffd" in printed and "\x1b" not in printed


def test_reward_trains_on_the_file_as_it_is(label, tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"say {n}"} for n in range(9)])
    typed = ["2>1=3", "1=2=3", "3 1 2"] * 3
    assert label("\n".join(typed), likert=True, flags=True, **{"k": 3}) == 0  # grades come first
    assert label("\n".join(typed)) == 9
    comparisons = read_comparisons(tmp_path / "out.jsonl")
    rankings = reward.encode(comparisons, Tokenizer.bytes(), 32, "error")
    assert sorted(len(r.pairs) for r in rankings) == [2, 2, 2, 3, 3, 3]
    config = reward.RewardConfig(
        str(tmp_path / "base"),
        (str(tmp_path / "out.jsonl"),),
        batch=2,
        optim=OptimConfig(),
        run=RunConfig(out=str(tmp_path / "reward"), dtype="float32"),
    )
    assert (reward.run(config) / "model.safetensors").exists()


QUESTION = r"as 2>1=3: "  # nothing comes after it until something is typed


def read_until(terminal, pattern, timeout=120.0):
    """What comes from a terminal, until it ends in `pattern`."""
    seen, deadline = b"", time.monotonic() + timeout
    while not re.search(f"{pattern}$", seen.decode(errors="replace"), re.DOTALL):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {pattern!r} in {seen.decode(errors='replace')}"
        seen += os.read(terminal, 65536)
    return seen.decode()


def test_in_a_real_terminal(tmp_path):
    """Typed lines, a typing error, a kill; then the same command asks for the rest alone."""
    save_model(tmp_path / "base")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
    flags = ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    flags += ["--k", "2", "--max-tokens", "4", "--labeler", "a"]
    command = [sys.executable, "-m", "instructcore", "label", str(tmp_path / "base"), *flags]

    def session():
        ours, theirs = pty.openpty()
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd="/")
        os.close(theirs)
        return process, ours

    process, terminal = session()
    assert "3 prompts to rank" in read_until(terminal, QUESTION)
    os.write(terminal, b"1>3\n")
    read_until(terminal, f"an answer is a number from 1 to 2, got '3'.*{QUESTION}")
    os.write(terminal, b"1=2\n")
    assert "写一首诗" in read_until(terminal, QUESTION)
    process.kill()
    process.wait()
    os.close(terminal)
    assert [r["ranks"] for r in lines(tmp_path / "out.jsonl")] == [[1, 1]]

    process, terminal = session()
    assert "写一首诗" in read_until(terminal, QUESTION)
    assert cli.main(command[3:]) == 2  # two at a time would ask the same
    os.write(terminal, b"2>1\n")
    read_until(terminal, QUESTION)
    os.write(terminal, b"\x04")  # Ctrl-D
    assert "1 rankings added" in read_until(terminal, "prompts are left\r\n")
    assert process.wait(60) == 0
    os.close(terminal)
    assert [r["prompt"] for r in lines(tmp_path / "out.jsonl")] == PROMPTS[:2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k", "1"], "--k must be in [2, 26], got 1"),
        (["--prompts", "missing.jsonl"], "missing.jsonl: No such file"),
        (["--prompts", "long.jsonl"], "long.jsonl:2: a prompt must be shorter than the context"),
        (["--out", "nowhere/out.jsonl"], "--out nowhere/out.jsonl: there is no such directory"),
        (["--out", "base"], "base: Is a directory"),
        (["--out", "notes.txt"], "--out notes.txt ends in what is no ranking"),
        (["--out", "prompts.jsonl"], 'prompts.jsonl:1: the fields "prompt" fit no known format'),
        (["--out", "bare.jsonl"], 'bare.jsonl:1: the fields "prompt" fit no known format'),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "base")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "x"}])
    write_jsonl(tmp_path / "long.jsonl", [{"prompt": "x"}, {"prompt": "y" * 40}])
    (tmp_path / "notes.txt").write_text("do not lose\nthis")
    (tmp_path / "bare.jsonl").write_text('{"prompt": "x"}')
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    arguments = command_line("label", flags, prompts="prompts.jsonl", out="out.jsonl")
    assert cli.main([*arguments, "base"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
