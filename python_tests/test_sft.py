"""Supervised fine-tuning: what has a loss, what is held out, what is mixed in."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from toy_data import (
    WORDS,
    command_line,
    files_of,
    read_metrics,
    save_model,
    write_demonstrations,
    write_jsonl,
    write_text,
)

from instructcore import cli
from instructcore.config import OptimConfig, RunConfig
from instructcore.data import Demonstration, Turn, encode_demonstrations, pack
from instructcore.model import GPT, ModelConfig, load
from instructcore.pretrain import next_token_loss
from instructcore.sft import SFTConfig, run, split
from instructcore.tokenizer import Tokenizer


def config_for(tmp_path, name="run", **settings):
    base, data = tmp_path / "base", tmp_path / "data.jsonl"
    if not base.exists():
        save_model(base)
        write_demonstrations(data)
    out = RunConfig(dtype="float32", out=str(tmp_path / name), log_every=1)
    defaults = {"batch": 8, "epochs": 1, "optim": OptimConfig(lr=1e-2), "run": out}
    return SFTConfig(str(base), (str(data),), **(defaults | settings))


@pytest.mark.checklist(1)
@pytest.mark.bug("TRL#1623")
def test_the_loss_is_on_responses_and_their_eos_alone():
    tokenizer = Tokenizer.bytes()
    turns = Turn("ab", False), Turn("cd", True), Turn("e", False), Turn("f", True)
    (row,) = encode_demonstrations([Demonstration(turns, {})], tokenizer, 32, "error")
    assert row[0] == [97, 98, 258, 99, 100, 257, 101, 258, 102, 257]
    model = GPT(ModelConfig(vocab_size=259, context=32, layers=1, heads=1, width=8))
    packed = pack([row])
    logits = model(packed.tokens, packed.cu_seqlens)
    # c, d and the EOS after them, f and its EOS: predicted at the positions before.
    at, tokens = torch.tensor([2, 3, 4, 7, 8]), torch.tensor([99, 100, 257, 102, 257])
    expected = F.cross_entropy(logits[at], tokens)
    torch.testing.assert_close(next_token_loss(model, packed, 5), expected, rtol=1e-6, atol=0)


def test_it_learns_to_answer(tmp_path):
    save_model(tmp_path / "base", width=32)
    write_demonstrations(tmp_path / "data.jsonl")
    final = run(config_for(tmp_path, epochs=25, val_fraction=0.1))
    lines = read_metrics(tmp_path / "run")
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert lines[0].keys() == {"step", "val_loss"} and lines[0]["step"] == 0
    # 48 demonstrations, 5 held out: 43 * 25 // 8 steps; a held-out loss at 0 and every 43 // 8.
    assert lines[-1]["step"] == 134 and len(losses) == 1 + 27
    assert losses[0] == pytest.approx(math.log(259), abs=0.2) and losses[-1] < 0.1
    model, tokenizer = load(final), Tokenizer.load(final)
    for word in WORDS[:3]:
        ids = tokenizer.prompt_ids(f"say {word}")
        while len(ids) < 32 and ids[-1] != tokenizer.eos_id:
            cut = torch.tensor([0, len(ids)], dtype=torch.int32)
            ids.append(int(model(torch.tensor(ids), cut)[-1].argmax()))
        assert tokenizer.decode(ids) == f"say {word}{word}"


def test_split_is_a_partition_that_the_seed_decides():
    rows, held_out = split(list(range(50)), 0.1, seed=3)
    assert len(held_out) == 5 and sorted(rows + held_out) == list(range(50))
    assert split(list(range(50)), 0.1, seed=3) == (rows, held_out)
    assert split(list(range(50)), 0.1, seed=4)[1] != held_out
    assert len(split([1, 2, 3], 0.01, 0)[1]) == 1 and split([1, 2, 3], 0.0, 0)[1] == []


def test_micro_batches_do_not_change_the_run(tmp_path):
    losses = []
    for micro in (0, 2):
        run(config_for(tmp_path, name=f"run-{micro}", micro_batch=micro))
        losses.append([line["loss"] for line in read_metrics(tmp_path / f"run-{micro}")[1:]])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_pretraining_text_has_its_share_of_the_tokens(tmp_path, monkeypatch):
    text = write_text(tmp_path / "text.txt")
    sizes = []

    def record(model, packed, count):
        sizes.append((packed.cu_seqlens.diff().tolist(), len(packed.tokens)))
        return next_token_loss(model, packed, count)

    monkeypatch.setattr("instructcore.sft.next_token_loss", record)
    mix = {"pretrain_data": (str(text),), "pretrain_mix": 0.25, "epochs": 4}
    run(config_for(tmp_path, val_fraction=0.0, **mix))
    examples = sum(n for lengths, n in sizes if len(lengths) == 8)
    windows = sum(n for lengths, n in sizes if len(lengths) != 8)
    assert windows / (windows + examples) == pytest.approx(0.25, abs=0.02)
    longest = max(max(lengths) for lengths, _ in sizes)
    assert all(set(lengths) == {longest} for lengths, _ in sizes if len(lengths) != 8)


def test_a_base_tokenizer_gets_the_marker(tmp_path):
    """A checkpoint from elsewhere knows no special tokens: its vocabulary grows, the rest stays."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    letters = {letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = Backend(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    config = ModelConfig(vocab_size=256, context=32, layers=1, heads=2, width=16)
    GPT(config).save(tmp_path / "foreign")
    backend.save(str(tmp_path / "foreign" / "tokenizer.json"))
    write_demonstrations(tmp_path / "data.jsonl")
    out = RunConfig(dtype="float32", out=str(tmp_path / "run"))
    init = str(tmp_path / "foreign")
    final = run(SFTConfig(init, (str(tmp_path / "data.jsonl"),), batch=8, run=out))
    tokenizer, model = Tokenizer.load(final), load(final)
    assert None not in (tokenizer.assistant_id, tokenizer.eos_id, tokenizer.pad_id)
    assert model.config.vocab_size == tokenizer.vocab_size == 259
    assert tokenizer.encode("abc") == Tokenizer.load(tmp_path / "foreign").encode("abc")


def test_dropout_is_set_for_training_and_off_for_evaluation(tmp_path):
    run(config_for(tmp_path, dropout=0.5))
    run(config_for(tmp_path, name="plain"))
    dropped, plain = (read_metrics(tmp_path / name) for name in ("run", "plain"))
    assert dropped[0]["val_loss"] == plain[0]["val_loss"]
    assert dropped[1]["loss"] != plain[1]["loss"]


def test_overlong_rows(tmp_path, capsys):
    records = [{"prompt": "x", "response": "y" * n} for n in [5] * 20 + [40] * 4]
    config_for(tmp_path)
    write_jsonl(tmp_path / "data.jsonl", records)
    run(config_for(tmp_path))
    assert "4 of 24 demonstrations do not fit the context of 32" in capsys.readouterr().err
    for form, code in (("truncate", 0), ("error", 2)):
        arguments = ["--init", str(tmp_path / "base"), "--data", str(tmp_path / "data.jsonl")]
        out = ["--out", str(tmp_path / form), "--batch", "4", "--overlong", form]
        assert cli.main(["sft", *arguments, *out]) == code
    assert "data.jsonl:21: 43 tokens" in capsys.readouterr().err
    assert not (tmp_path / "error").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "missing.jsonl"], "missing.jsonl: No such file"),
        (["--data", "bad.jsonl"], "bad.jsonl:1: not valid JSON"),
        (["--data", "fields.jsonl"], 'fields.jsonl:1: the fields "ask", "say" fit no known format'),
        (["--init", "cut"], "model.safetensors: not a readable safetensors file"),
        (["--init", "missing"], "no checkpoint at missing"),
        (["--init", "shape"], "must be floating point of shape"),
        (["--batch", "100"], "--batch must be at most the 46 demonstrations to train on, got 100"),
        (["--micro-batch", "3"], "--micro-batch must divide --batch, got 3 and 8"),
        (["--pretrain-data", "missing.txt"], "missing.txt: No such file"),
        (["--pretrain-data", "short.txt"], "the training text must be longer than the context"),
        (["--pretrain-data", "bad.jsonl"], "bad.jsonl:1: not valid JSON"),
        (["--out", "data.jsonl/run"], "--out data.jsonl/run: "),
        (["--out", "/proc/nowhere/run"], "/proc/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    write_demonstrations(tmp_path / "data.jsonl")
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "short.txt").write_text("red")
    write_jsonl(tmp_path / "fields.jsonl", [{"ask": "x", "say": "y"}])
    for name in ("base", "cut", "shape"):
        save_model(tmp_path / name, width=32 if name == "shape" else 16)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "base" / "model.safetensors").replace(tmp_path / "shape" / "model.safetensors")
    save_model(tmp_path / "base")
    defaults = {"init": "base", "data": "data.jsonl", "out": "run", "batch": "8"}
    assert cli.main(command_line("sft", flags, **defaults)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_directory_in_use_is_left_alone(tmp_path, capsys):
    config = config_for(tmp_path)
    run(config)
    before = files_of(tmp_path)
    flags = ["--init", config.init, "--data", *config.data, "--out", config.run.out]
    assert cli.main(["sft", *flags]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert files_of(tmp_path) == before
