"""Data: every format and every complaint, packing, order, and the token stream."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from instructcore import data
from instructcore.data import (
    IGNORED,
    Demonstration,
    EpochOrder,
    TokenStream,
    Turn,
    encode_demonstrations,
    pack,
    read_comparisons,
    read_demonstrations,
    read_documents,
    read_prompts,
)
from instructcore.errors import UserError
from instructcore.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
EOS, ASSISTANT = BYTES.eos_id, BYTES.assistant_id
WORDS = ["tree", "river", " the", " a", "\n", "\n\n", ". ", ", ", "12", "写一篇", "文章", "  "]


def random_text(characters: int, seed: int = 0) -> str:
    words = np.random.default_rng(seed).integers(len(WORDS), size=characters // 2)
    return "".join(WORDS[i] for i in words)[:characters]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train([random_text(20_000)], 300)


@pytest.fixture
def write(tmp_path):
    """write(name, content) makes a file of text, bytes, or a list of rows, one JSON a line."""

    def make(name, content):
        path = tmp_path / name
        if isinstance(content, list):
            lines = (r if isinstance(r, str) else json.dumps(r) for r in content)
            content = "".join(line + "\n" for line in lines)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


# ---- Formats


@pytest.mark.parametrize(
    "row, turns",
    [
        ({"instruction": "Add.", "output": "3"}, ["Add.", "3"]),
        ({"instruction": "Add.", "input": "", "output": "3"}, ["Add.", "3"]),
        ({"instruction": "Add.", "input": None, "output": "3"}, ["Add.", "3"]),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, ["Add.\n\n1 2", "3"]),
        ({"prompt": "写诗。", "completion": "月光。"}, ["写诗。", "月光。"]),
        ({"prompt": "p", "response": ""}, ["p", ""]),
        ({"question": "q", "answer": "a", "id": 7}, ["q", "a"]),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "u"},
                    {"role": "assistant", "content": "a"},
                    {"role": "user", "content": "v"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "unanswered"},
                ]
            },
            ["s\n\nu", "a", "v", "b"],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": t} for t in "uv"]},
                    {"role": "assistant", "content": "a"},
                ]
            },
            ["uv", "a"],
        ),
        (
            {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]},
            ["h", "g"],
        ),
    ],
)
def test_demonstrations(write, row, turns):
    path = write("d.jsonl", [row])
    (read,) = read_demonstrations(path)
    assert read.turns == tuple(Turn(text, i % 2 == 1) for i, text in enumerate(turns))
    assert read.record == row and read.where == f"{path}:1"


def test_demonstrations_of_many_formats_and_files(write):
    rows = [{"prompt": "a", "response": "b"}, "", {"question": "c", "answer": "d"}]
    one = write("one.jsonl", rows)
    two = write("two.txt", [{"messages": [{"role": "assistant", "content": "first"}]}])
    read = read_demonstrations([one, str(two)])
    assert [[t.text for t in d.turns] for d in read] == [["a", "b"], ["c", "d"], ["first"]]
    assert [d.where for d in read] == [f"{one}:1", f"{one}:3", f"{two}:1"]


GRADED = {
    "question": "q",
    "ground_truth": "g",
    "small": {"is_correct": False, "solution": "s"},
    "large": {"is_correct": True, "solution": "t"},
    "large2": {"is_correct": True, "solution": "u"},
}


@pytest.mark.parametrize(
    "row, responses, better, tied",
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, ["good", "bad"], {(0, 1)}, set()),
        (
            {"prompt": "q", "responses": ["x", "y", "z"], "ranks": [2, 1, 2]},
            ["x", "y", "z"], {(1, 0), (1, 2)}, {(0, 2)},
        ),
        (
            {"prompt": "q", "responses": ["x", "y", "z"], "scores": [0.5, 2, 2.0]},
            ["x", "y", "z"], {(1, 0), (2, 0)}, {(1, 2)},
        ),
        (GRADED, ["s", "t", "u"], {(1, 0), (2, 0)}, {(1, 2)}),
    ],
)  # fmt: skip
def test_comparisons(write, row, responses, better, tied):
    (read,) = read_comparisons(write("c.jsonl", [row]))
    ranks, indices = read.ranks, range(len(responses))
    assert read.prompt == "q" and read.responses == tuple(responses) and read.record == row
    assert {(a, b) for a in indices for b in indices if ranks[a] < ranks[b]} == better
    assert {(a, b) for a in indices for b in indices if a < b and ranks[a] == ranks[b]} == tied


@pytest.mark.parametrize(
    "row, text",
    [
        ({"prompt": "p", "answer_key": 3}, "p"),
        ({"instruction": "i", "input": "x"}, "i\n\nx"),
        ({"question": "q", "answer": "a"}, "q"),
        ({"messages": [{"role": "user", "content": "u"}]}, "u"),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "u"},
                    {"role": "assistant", "content": "a"},
                    {"role": "user", "content": "v"},
                ]
            },
            "s\n\nu",
        ),
        (GRADED, "q"),
    ],
)
def test_prompts(write, row, text):
    (read,) = read_prompts(write("p.jsonl", [row]))
    assert read.text == text and read.record == row


def test_prompts_of_plain_text(write):
    read = read_prompts(write("p.txt", "Write a poem.\r\n\r\n 写一篇文章。 \n"))
    assert [p.text for p in read] == ["Write a poem.", "写一篇文章。"]
    assert read[1].record == {"prompt": "写一篇文章。"} and read[1].where.endswith("p.txt:3")


def test_json_lines_are_known_without_the_suffix(write):
    path = write("prompts", [{"prompt": "p"}])
    assert read_prompts(path)[0].text == "p"
    assert list(read_documents(write("documents", [{"text": "t"}, {"text": "u"}]))) == ["t", "u"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_byte_order_mark_and_line_ends(write, tmp_path, mark, end):
    rows = [json.dumps({"prompt": "a\nb", "response": "é"}) + end for _ in range(3)]
    read = read_demonstrations(write("d.jsonl", mark + "".join(rows).encode()))
    assert [d.turns[0].text for d in read] == ["a\nb"] * 3
    text = write("t.txt", mark + f"one{end}two{end}{end}three".encode())
    assert "".join(read_documents(text)) == "one\ntwo\n\nthree"


# ---- Bad input

D, C, P = read_demonstrations, read_comparisons, read_prompts


def documents(path):
    return list(read_documents(path))


@pytest.mark.parametrize(
    "read, lines, complaint",
    [
        (D, ["{}"], r":1: the fields \(none\) fit no known format of demonstrations, which are"),
        (D, [{"prompt": "p", "responze": "r"}], r':1: the fields "prompt", "responze" fit'),
        (D, [{"prompt": "p", "response": "r"}, '{"prompt": "p"'], r":2: not valid JSON: Expecting"),
        (D, [{"prompt": "p", "response": "r"}, "", "{,}"], r":3: not valid JSON: .*: column 2 "),
        (D, ["[", "{}", "]"], r":1: not valid JSON: .*; an array becomes lines with `jq"),
        (D, ["[" * 100_000], r":1: not valid JSON: .*recursion"),
        (D, ["[1, 2]"], r":1: a line must be one JSON object, got \[1, 2\]"),
        (D, ['"text"'], r':1: a line must be one JSON object, got "text"'),
        (D, [{"prompt": 3, "response": "r"}], r':1: "prompt" must be a string, got 3'),
        (D, [{"prompt": "p", "response": None}], r':1: "response" must be a string, got null'),
        (D, [{"instruction": "p", "input": ["x"], "output": "r"}], r':1: "input" must be a string'),
        (D, [{"messages": "hello"}], r':1: "messages" must be a list of messages, got "hello"'),
        (D, [{"messages": []}], r':1: "messages" must be a list of messages, got \[\]'),
        (D, [{"messages": ["hi"]}], r":1: messages, message 1 must have {role"),
        (D, [{"messages": [{"role": "user"}]}], r":1: messages, message 1 must have {role"),
        (
            D,
            [{"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}]}],
            r":1: messages, message 1 must have {role, content} .* parts {type: text, text}",
        ),
        (
            D,
            [{"messages": [{"role": "assistant", "content": "a"}, {"role": "x", "content": "a"}]}],
            r':1: messages, message 2: role must be one of assistant, .*, got "x"',
        ),
        (D, [{"messages": [{"role": "user", "content": "u"}]}], r":1: .* no message of the"),
        (C, [{"question": "q", "answer": "a"}], r":1: the fields .* of comparisons, which are"),
        (C, [{"chosen": "a", "rejected": "b"}], r":1: the fields .* of comparisons"),
        (C, [{"prompt": "p", "responses": ["a", "b"]}], r":1: the fields .* ranks: .*1 is best"),
        (C, [{"prompt": "p", "chosen": "a", "rejected": 1}], r':1: .* 2 strings, got \["a", 1\]'),
        (C, [{"prompt": "p", "responses": "ab", "ranks": [1, 2]}], r":1: the responses must be at"),
        (C, [{"prompt": "p", "responses": ["a"], "ranks": [1]}], r":1: .* at least 2 strings"),
        (C, [{"prompt": "p", "responses": ["a", "b"], "ranks": [1]}], r":1: .* must be 2 finite"),
        (C, [{"prompt": "p", "responses": ["a", "b"], "ranks": ["1", 2]}], r":1: .* 2 finite"),
        (C, ['{"prompt": "p", "responses": ["a", "b"], "scores": [1, NaN]}'], r":1: .* 2 finite"),
        (C, [GRADED | {"large": {"is_correct": "yes", "solution": "t"}}], r":1: .* 3 finite"),
        (C, [GRADED | {"large": {"is_correct": True}}], r":1: the responses must be at least 2"),
        (P, [{"text": "t"}], r":1: the fields \"text\" fit no known format of prompts, which"),
        (P, [{"messages": [{"role": "gpt", "content": "g"}]}], r":1: .* begin with a message"),
        (documents, [{"text": "t"}, {"texts": "t"}], r":2: the fields \"texts\" .* are {text}"),
        (documents, [{"text": 1}], r':1: "text" must be a string, got 1'),
    ],
)  # fmt: skip
def test_bad_lines(write, read, lines, complaint):
    path = write("bad.jsonl", lines)
    with pytest.raises(UserError, match=complaint) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:") and "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("read", [D, C, P, documents])
def test_bad_files(write, tmp_path, read):
    with pytest.raises(UserError, match=r"missing\.jsonl: No such file"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match=r"Is a directory"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"empty\.jsonl: the file is empty"):
        read(write("empty.jsonl", ""))
    good = json.dumps({"prompt": "p", "response": "r", "text": "t", "chosen": "a", "rejected": "b"})
    for name in "bad.jsonl", "bad.txt":
        path = write(name, f"{good}\n{good}\n".encode() + b'{"prompt": "\xff"}\n')
        with pytest.raises(UserError, match=rf"{name}:3: not valid UTF-8"):
            read(path)
    with pytest.raises(UserError, match="no data files"):
        read([])


def test_only_empty_lines(write):
    with pytest.raises(UserError, match="nothing but empty lines"):
        read_demonstrations(write("d.jsonl", "\n \n\n"))


def test_every_file_is_looked_at_first(write, tmp_path):
    good = write("d.jsonl", [{"prompt": "p"}])
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        read_demonstrations([good, tmp_path / "missing.jsonl"])


def test_invalid_utf8_deep_in_a_text(write):
    path = write("t.txt", b"line\n" * 100_000 + b"\xe5\x86\n" + b"line\n" * 100_000)
    with pytest.raises(UserError, match=r"t\.txt:100001: not valid UTF-8"):
        list(read_documents(path))
    cut_short = write("u.txt", "人".encode()[:2])
    with pytest.raises(UserError, match=r"u\.txt:1: not valid UTF-8"):
        list(read_documents(cut_short))


# ---- Demonstrations as tokens


def demonstration(*texts: str) -> Demonstration:
    return Demonstration(tuple(Turn(t, i % 2 == 1) for i, t in enumerate(texts)), {}, "f.jsonl:9")


def test_layout_and_loss():
    ((ids, mask),) = encode_demonstrations([demonstration("ab", "c", "d", "ef")], BYTES, 64, "drop")
    a, b, c, d, e, f = b"abcdef"
    assert ids == [a, b, ASSISTANT, c, EOS, d, ASSISTANT, e, f, EOS]
    assert mask == [False, False, False, True, True, False, False, True, True, True]
    packed = pack([(ids, mask)])
    _ = IGNORED
    assert packed.targets.tolist() == [_, _, c, EOS, _, _, e, f, EOS, _]
    assert ids[:3] == BYTES.prompt_ids("ab")


def test_text_that_spells_a_marker_is_text():
    spelling = demonstration("<|eos|>", "<|assistant|>")
    ((ids, _),) = encode_demonstrations([spelling], BYTES, 64, "drop")
    assert ids.count(EOS) == 1 and ids.count(ASSISTANT) == 1


def test_overlong(capsys):
    short, long = demonstration("a", "b"), demonstration("a", "b" * 7)
    rows = encode_demonstrations([short] * 4 + [long], BYTES, 9, "drop")
    assert len(rows) == 4
    said = capsys.readouterr().err
    assert said == "1 of 5 demonstrations do not fit the context of 9 tokens: left out\n"
    assert len(encode_demonstrations([short] * 3 + [long], BYTES, 10, "drop")) == 4  # fits exactly
    with pytest.raises(UserError, match=r"1 of 4 demonstrations .* of 9 tokens, more than 20%"):
        encode_demonstrations([short] * 3 + [long], BYTES, 9, "drop")
    with pytest.raises(UserError, match=r"f\.jsonl:9: 10 tokens, more than the context of 9"):
        encode_demonstrations([short, long], BYTES, 9, "error")
    capsys.readouterr()
    (row,) = encode_demonstrations([long], BYTES, 9, "truncate")
    assert row == ([97, ASSISTANT] + [98] * 7, [False] * 2 + [True] * 7)
    assert capsys.readouterr().err == ""
    without_response = demonstration("a" * 20, "b")
    rows = encode_demonstrations([short] * 5 + [without_response], BYTES, 9, "truncate")
    assert len(rows) == 5 and "1 of 6" in capsys.readouterr().err
    with pytest.raises(UserError, match="overlong must be one of"):
        encode_demonstrations([short], BYTES, 9, "pad")


# ---- Packing and order


def test_pack_known_values():
    packed = pack([([5, 6, 7], [False, True, True]), ([8], None), ([9, 10], None)])
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9, 10]
    assert packed.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert packed.targets.tolist() == [6, 7, IGNORED, IGNORED, 10, IGNORED]
    assert packed.max_seqlen == 3
    types = [t.dtype for t in packed[:3]]
    assert types == [torch.int64, torch.int32, torch.int64]


def test_pack_is_that_of_its_parts():
    rng = np.random.default_rng(0)
    rows = [
        (rng.integers(0, 99, n).tolist(), rng.integers(0, 2, n).astype(bool).tolist())
        for n in rng.integers(1, 40, size=50)
    ]
    packed = pack(rows)
    cuts = packed.cu_seqlens.tolist()
    for row, begin, end in zip(rows, cuts, cuts[1:], strict=False):
        alone = pack([row])
        assert torch.equal(packed.tokens[begin:end], alone.tokens)
        assert torch.equal(packed.targets[begin:end], alone.targets)
    assert cuts[-1] == len(packed.tokens) == sum(len(ids) for ids, _ in rows)  # no padding
    assert packed.max_seqlen == max(len(ids) for ids, _ in rows)


@pytest.mark.parametrize("rows", [[], [([], None)], [([1, 2], None), ([], [])], [([1, 2], [True])]])
def test_pack_rejects(rows):
    with pytest.raises(ValueError, match="pack: "):
        pack(rows)


def test_epoch_order():
    order = EpochOrder(10, seed=3)
    batches = [order.batch(step, 4) for step in range(5)]  # two epochs
    items = sum(batches, [])
    assert sorted(items[:10]) == sorted(items[10:]) == list(range(10))
    assert items[:10] != items[10:]
    assert EpochOrder(10, seed=3).batch(4, 4) == batches[4]  # from the step alone
    assert EpochOrder(10, seed=4).batch(0, 10) != order.batch(0, 10)
    assert order.batch(0, 25)[:20] == items and len(order.batch(0, 25)) == 25
    with pytest.raises(ValueError, match="at least 1"):
        EpochOrder(0, seed=0)


# ---- The token stream


def test_split_of_a_text(write, tmp_path):
    """The size of tiny Shakespeare: 1,003,854 bytes to train on and 111,540 held out."""
    content = np.random.default_rng(0).integers(32, 127, 1_115_394).astype(np.uint8).tobytes()
    train, val = TokenStream.build(write("t.txt", content), BYTES, tmp_path / "tokens", 0.1)
    assert len(train) == int(1_115_394 * 0.9) == 1_003_854 and len(val) == 111_540
    assert (
        train.tokens.tobytes() + val.tokens.tobytes()
        == np.frombuffer(content, np.uint8).astype(np.uint16).tobytes()
    )
    assert train.starts.tolist() == val.starts.tolist() == [0]


def test_split_of_documents_and_files(write, tmp_path):
    rows = [{"text": str(i) * (i + 1)} for i in range(10)]
    jsonl, text = write("d.jsonl", rows + [{"text": ""}]), write("t.txt", "x" * 10)
    train, val = TokenStream.build([jsonl, text, jsonl], BYTES, tmp_path / "tokens", 0.25)
    documents = [list(row["text"].encode()) + [EOS] for row in rows]
    x = ord("x")
    assert train.tokens.tolist() == sum(documents[:7], []) + [x] * 7 + sum(documents[:7], [])
    assert val.tokens.tolist() == sum(documents[7:], []) + [x] * 3 + sum(documents[7:], [])
    lengths = [len(d) for d in documents]
    for stream, part, letters in (train, lengths[:7], 7), (val, lengths[7:], 3):
        ends = np.cumsum(part + [letters] + part)
        assert stream.starts.tolist() == [0, *ends[:-1]]


def test_one_document_is_for_training(write, tmp_path):
    one, many = write("1.jsonl", [{"text": "only"}]), write("2.jsonl", [{"text": "ab"}] * 4)
    train, val = TokenStream.build([one, many], BYTES, tmp_path / "tokens", 0.5)
    assert len(train) == 5 + 2 * 3 and len(val) == 2 * 3


def test_nothing_held_out(write, tmp_path):
    train, val = TokenStream.build(write("t.txt", "abcdef"), BYTES, tmp_path / "tokens", 0.0)
    assert len(train) == 6 and len(val) == 0 and list(val.windows(4, 1)) == []


@pytest.mark.parametrize("context", [1, 7, 64, 1000])
def test_windows_have_every_target_once(write, tmp_path, context):
    text, jsonl = write("t.txt", random_text(900)), write("d.jsonl", [{"text": "abc"}] * 90)
    _, val = TokenStream.build([text, jsonl], BYTES, tmp_path / "tokens", 0.5)
    starts = set(val.starts.tolist())
    position = 0  # of the next target's token, less 1
    sizes = []
    for packed in val.windows(context, 3):
        tokens = val.tokens[position : position + len(packed.tokens)].astype(np.int64)
        assert packed.tokens.tolist() == tokens.tolist()
        for i, target in enumerate(packed.targets.tolist(), position + 1):
            assert target == (IGNORED if i in starts else val.tokens[i])
        every = {*range(0, len(tokens), context), len(tokens)}
        cuts = every | {s - position for s in starts if position < s < position + len(tokens)}
        assert packed.cu_seqlens.tolist() == sorted(cuts)
        assert packed.max_seqlen == packed.cu_seqlens.diff().max()
        position += len(tokens)
        sizes.append(len(tokens))
    assert position == len(val) - 1
    assert max(sizes) <= 3 * context


def test_batch_cuts_documents():
    """Documents 0..3 of 5, 3, 1 and 6 tokens, and windows of 6 from the places 0, 4 and 8."""
    stream = TokenStream(np.arange(15).astype(np.uint16), np.array([0, 5, 8, 9]))
    packed = stream._windows(np.array([0, 4, 8]), 6)
    assert packed.tokens.tolist() == [*range(0, 6), *range(4, 10), *range(8, 14)]
    assert packed.cu_seqlens.tolist() == [0, 5, 6, 7, 10, 11, 12, 13, 18]
    _ = IGNORED
    assert packed.targets.tolist() == [
        *(1, 2, 3, 4, _, 6), *(_, 6, 7, _, _, 10), *(_, 10, 11, 12, 13, 14),
    ]  # fmt: skip
    assert packed.max_seqlen == 5
    # A document that begins with a window's last target ends it, and cuts nothing.
    packed = stream._windows(np.array([2]), 3)
    assert packed.cu_seqlens.tolist() == [0, 3] and packed.targets.tolist() == [3, 4, _]


def test_batch_is_a_function_of_seed_and_step():
    stream = TokenStream(np.arange(1000).astype(np.uint16), np.array([0]))
    one = stream.batch(5, 1, 12, 64)
    again = TokenStream(stream.tokens.copy(), stream.starts.copy())
    for other in stream.batch(5, 1, 12, 64), again.batch(5, 1, 12, 64):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
    assert not torch.equal(one.tokens, stream.batch(6, 1, 12, 64).tokens)
    assert not torch.equal(one.tokens, stream.batch(5, 2, 12, 64).tokens)
    assert torch.equal(one.targets, one.tokens + 1)
    assert one.cu_seqlens.tolist() == list(range(0, 12 * 64 + 1, 64)) and one.max_seqlen == 64


def test_batch_draws_every_place():
    stream = TokenStream(np.arange(10).astype(np.uint16), np.array([0]))
    first = {int(t) for step in range(30) for t in stream.batch(step, 0, 8, 4).tokens[::4]}
    assert first == set(range(6))  # the last window's last target is the last token
    assert len(stream.batch(0, 0, 2, 9).tokens) == 18
    with pytest.raises(UserError, match="longer than the context of 10 tokens, got 10 tokens"):
        stream.batch(0, 0, 2, 10)


def test_too_little_text(write, tmp_path):
    with pytest.raises(UserError, match=r"t\.txt: too little text: 9 tokens .* 1 held out"):
        TokenStream.build(write("t.txt", "0123456789"), BYTES, tmp_path / "tokens", 0.1)
    with pytest.raises(UserError, match=r"too little text: 0 tokens"):
        TokenStream.build(write("d.jsonl", "\n\n"), BYTES, tmp_path / "tokens", 0.0)
    with pytest.raises(UserError, match=r"t\.txt: the file is empty"):
        TokenStream.build(write("t.txt", ""), BYTES, tmp_path / "tokens", 0.1)
    with pytest.raises(UserError, match=r"val_fraction must be in \[0, 1\), got 1"):
        TokenStream.build(write("t.txt", "abc"), BYTES, tmp_path / "tokens", 1)


def test_pieces_have_the_tokens_of_the_whole(write, tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 500)
    monkeypatch.setattr(data, "BATCH", 2000)
    text = random_text(30_000, seed=1)
    path = write("t.txt", text)
    assert "".join(read_documents(path)) == text
    assert max(map(len, read_documents(path))) < 1000
    train, val = TokenStream.build(path, bpe, tmp_path / "tokens", 0.1)
    ids = bpe.encode(text)
    assert train.tokens.tolist() + val.tokens.tolist() == ids
    assert len(train) == int(len(ids) * 0.9)


@pytest.mark.parametrize("text", ["人" * 5000, "a" * 5000, " " * 5000, "\n" * 5000])
def test_text_without_good_places_to_cut(write, monkeypatch, text):
    monkeypatch.setattr(data, "PIECE", 512)
    pieces = list(read_documents(write("t.txt", text)))
    assert "".join(pieces) == text and len(pieces) == 10


def test_large_vocabulary(write, tmp_path):
    class Large:
        kind, vocab_size, eos_id, assistant_id = "bpe", 70_000, 69_999, None

        def save(self, directory):
            Path(directory, "tokenizer.json").touch()

        def encode_batch(self, texts):
            return [[65_536 + ord(c) for c in text] for text in texts]

    train, _ = TokenStream.build(write("d.jsonl", [{"text": "ab"}]), Large(), tmp_path / "t", 0.0)
    assert train.tokens.dtype == np.uint32
    assert train.tokens.tolist() == [65_536 + 97, 65_536 + 98, 69_999]


@pytest.mark.parametrize("kind", ["text", "one line", "jsonl"])
def test_memory_is_bounded(tmp_path, kind):
    line = {"text": "some words " * 90 + "\n", "one line": "words" * 200}.get(kind)
    line = line or json.dumps({"text": "some words " * 900}) + "\n"
    path = tmp_path / ("t.jsonl" if kind == "jsonl" else "t.txt")
    with path.open("w") as file:
        for _ in range(30):
            file.write(line * (1_000_000 // len(line)))
    size = path.stat().st_size
    assert size > 29_000_000
    calls = []
    tracemalloc.start()
    try:
        train, val = TokenStream.build(
            path, BYTES, tmp_path / "tokens", 0.1, lambda *read: calls.append(read)
        )
        train.batch(0, 0, 12, 64)
        next(val.windows(64, 12))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12_000_000
    assert len(train) + len(val) > 27_000_000
    assert len(calls) > 20 and calls == sorted(calls) and calls[-1] == (size, size)


def test_cache(write, tmp_path, bpe):
    path = write("t.txt", random_text(3000))
    calls = []

    def build(tokenizer=BYTES, fraction=0.1, paths=path):
        calls.clear()
        stream = TokenStream.build(paths, tokenizer, tmp_path / "tokens", fraction, report)[0]
        return stream.tokens.tolist(), bool(calls)

    def report(done, total):
        calls.append(done)

    tokens, new = build()
    assert new and build() == (tokens, False)
    assert build(Tokenizer.bytes()) == (tokens, False)
    assert build(fraction=0.2)[1] and build(bpe)[1] and build(paths=[path, path])[1]
    assert build() == (tokens, False)
    content, status = path.read_bytes(), path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert build() == (tokens, True)  # a new time
    path.write_bytes(content + b"more")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    longer, new = build()
    assert new and len(longer) > len(tokens)  # a new size
    other = Tokenizer.train([random_text(20_000, seed=5)], 300)
    assert other.vocab_size == bpe.vocab_size and build(other)[1]  # new content alone


def test_a_build_cut_short_leaves_nothing_to_use(write, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BATCH", 10_000)
    path = write("t.jsonl", [{"text": random_text(500, i)} for i in range(100)])
    directory = tmp_path / "tokens"
    expected = TokenStream.build(path, BYTES, tmp_path / "whole", 0.1)

    def build_and_die(calls):
        def die(*_):
            nonlocal calls
            calls -= 1
            if calls <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

        if calls == 0:
            os.rename = die
        TokenStream.build(path, BYTES, directory, 0.1, die if calls else print)

    for calls in 1, 3, 5, 0:
        child = multiprocessing.get_context("fork").Process(target=build_and_die, args=(calls,))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert {p.name for p in (directory).iterdir()} == {"lock", "partial"}
    streams = TokenStream.build(path, BYTES, directory, 0.1)
    for stream, other in zip(streams, expected, strict=True):
        assert np.array_equal(stream.tokens, other.tokens)
        assert np.array_equal(stream.starts, other.starts)
    (built,) = (p for p in (directory).iterdir() if p.name != "lock")
    assert {p.name for p in built.iterdir()} == {"train", "val", "train.starts", "val.starts"}


def test_builders_wait_for_each_other(write, tmp_path):
    path, calls = write("t.txt", random_text(100_000)), []

    def build(_):
        return TokenStream.build(path, BYTES, tmp_path / "tokens", 0.1, lambda *c: calls.append(c))

    with ThreadPoolExecutor(4) as pool:
        streams = [train for train, _ in pool.map(build, range(4))]
    assert len(calls) == 1
    assert all(np.array_equal(stream.tokens, streams[0].tokens) for stream in streams)


def test_a_bad_line_keeps_no_tokens(write, tmp_path):
    good = [{"text": "good"}] * 10
    path = write("d.jsonl", [*good, "{"])
    for _ in range(2):
        with pytest.raises(UserError, match=r"d\.jsonl:11: not valid JSON"):
            TokenStream.build(path, BYTES, tmp_path / "tokens", 0.1)
    assert sorted(tmp_path.iterdir()) == [path]
    (tmp_path / "run").mkdir()  # what was there before stays
    with pytest.raises(UserError, match="longer than the context of 45 tokens"):
        text = write("good.jsonl", good)
        TokenStream.build(text, BYTES, tmp_path / "run" / "a" / "tokens", 0.1, window=45)
    assert not list((tmp_path / "run").iterdir())
    path.unlink()
    train, val = TokenStream.build(write("d.jsonl", good), BYTES, tmp_path / "tokens", 0.1)
    assert len(train) == 9 * 5 and len(val) == 5
