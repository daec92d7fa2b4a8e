"""Pre-training: its loss, its held-out loss, what it takes and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from toy_data import (
    command_line,
    files_of,
    read_metrics,
    save_model,
    write_jsonl,
    write_text,
)

from instructcore import cli
from instructcore.config import OptimConfig, RunConfig
from instructcore.data import pack
from instructcore.errors import UserError
from instructcore.model import GPT, ModelConfig, load
from instructcore.pretrain import (
    PretrainConfig,
    count_targets,
    held_out_loss,
    micro_batches,
    next_token_loss,
    run,
)
from instructcore.tokenizer import Tokenizer
from instructcore.train import newest_checkpoint

SHAPE = ModelConfig(context=16, layers=1, heads=2, width=16)


def model_and_batch(rows=6, length=8):
    config = ModelConfig(vocab_size=50, context=16, layers=2, heads=2, width=16)
    model = GPT(config, generator=torch.Generator().manual_seed(3))
    tokens = torch.randint(0, 50, (rows, length)).tolist()
    return model, pack([(row, None) for row in tokens]), tokens


def config_for(tmp_path, **settings):
    data = tmp_path / "text.txt"
    if not data.exists():
        write_text(data)
    out = RunConfig(dtype="float32", out=str(tmp_path / "run"), log_every=1)
    defaults = {"tokenizer": "bytes", "steps": 5, "batch": 4, "model": SHAPE, "run": out}
    return PretrainConfig(data=(str(data),), **(defaults | settings))


def test_loss_is_the_mean_over_all_targets():
    model, packed, tokens = model_and_batch()
    each = []
    for row in tokens:  # every sequence alone
        row = torch.tensor(row)
        logits = model(row, torch.tensor([0, len(row)], dtype=torch.int32))
        each.append(F.cross_entropy(logits[:-1], row[1:], reduction="sum"))
    count = count_targets(packed)
    assert count == 6 * 7
    loss = next_token_loss(model, packed, count)
    torch.testing.assert_close(loss, sum(each) / count, rtol=1e-5, atol=0)
    assert held_out_loss(model, [packed, packed]) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_change_neither_loss_nor_gradient(size):
    model, packed, _ = model_and_batch()
    count = count_targets(packed)
    whole = next_token_loss(model, packed, count)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    parts = list(micro_batches(packed, size * 8))
    assert len(parts) == 6 // size and sum(map(count_targets, parts)) == count
    losses = [next_token_loss(model, part, count) for part in parts]
    for loss in losses:
        loss.backward()
    assert sum(losses).item() == pytest.approx(whole.item(), rel=1e-6)
    pairs = [(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True)]
    error = sum(((ours - g) ** 2).sum() for ours, g in pairs)
    assert error.sqrt() <= 1e-5 * sum((g**2).sum() for _, g in pairs).sqrt()


def test_it_learns_and_reports_the_loss_over_the_whole_held_out_part(tmp_path):
    optim = OptimConfig(lr=1e-2, warmup=0.1)
    config = config_for(tmp_path, steps=80, batch=8, optim=optim, eval_every=40)
    final = run(config)
    lines = read_metrics(tmp_path / "run")
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert lines[39]["val_loss"] == losses[0] and lines[-1]["val_loss"] == losses[-1]
    assert lines[0]["loss"] == pytest.approx(math.log(259), abs=0.1)
    assert losses[-1] < losses[0] < 3.0 and losses[-1] < 2.2
    # Over all windows of 16 bytes of the last tenth, by hand, each from an empty context.
    text = (tmp_path / "text.txt").read_bytes()
    held_out = torch.tensor(list(text[int(len(text) * 0.9) :]))
    model, total = load(final), 0.0
    for begin in range(0, len(held_out) - 1, 16):
        x = held_out[begin : begin + 17]
        logits = model(x[:-1], torch.tensor([0, len(x) - 1], dtype=torch.int32))
        total += F.cross_entropy(logits, x[1:], reduction="sum").item()
    assert losses[-1] == pytest.approx(total / (len(held_out) - 1), rel=1e-5)


def test_seed_decides_and_micro_batch_does_not(tmp_path):
    finals = {}
    for name, seed, micro in (("a", 0, 0), ("b", 0, 2), ("c", 1, 0)):
        out = RunConfig(dtype="float32", out=str(tmp_path / name), seed=seed, log_every=1)
        finals[name] = load(run(config_for(tmp_path, run=out, micro_batch=micro)))
    a, b, c = (finals[name].embed.detach() for name in "abc")
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert (a - c).abs().max() > 1e-2
    first = [read_metrics(tmp_path / name)[0]["loss"] for name in "ab"]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_tokenizers(tmp_path):
    bpe = run(config_for(tmp_path, tokenizer="bpe", vocab_size=280))
    tokenizer = Tokenizer.load(bpe)
    assert tokenizer.kind == "bpe" and load(bpe).config.vocab_size == tokenizer.vocab_size <= 280
    again = RunConfig(dtype="float32", out=str(tmp_path / "again"))
    other = run(config_for(tmp_path, tokenizer=str(bpe / "tokenizer.json"), run=again))
    assert Tokenizer.load(other).encode("gold red") == tokenizer.encode("gold red")


def test_init_goes_on_from_a_checkpoint(tmp_path):
    base = save_model(tmp_path / "base", context=16, width=32)
    own = {"init": str(base), "tokenizer": "bpe"}
    config = config_for(tmp_path, **own, model=ModelConfig(dropout=0.1))
    final = load(run(config))
    assert (final.config.width, final.config.dropout) == (32, 0.1)
    other = RunConfig(dtype="float32", out=str(tmp_path / "other"))
    for settings, flags in (
        ({"model": ModelConfig(width=32)}, "--width"),
        ({"tokenizer": "bytes", "vocab_size": 300}, "--tokenizer, --vocab-size"),
        ({"given": ("vocab_size", "steps")}, "--vocab-size"),
    ):
        settings = own | {"model": ModelConfig(), "run": other} | settings
        with pytest.raises(UserError, match=f"shape: {flags} cannot be set beside it"):
            run(config_for(tmp_path, **settings))
    assert not (tmp_path / "other").exists()


def test_documents_of_jsonl(tmp_path):
    records = [{"text": f"document {i} about red and gold"} for i in range(40)]
    data = write_jsonl(tmp_path / "docs.jsonl", records)
    run(PretrainConfig(**(vars(config_for(tmp_path)) | {"data": (str(data),)})))
    assert math.isfinite(read_metrics(tmp_path / "run")[-1]["val_loss"])


SMALL = "--layers 1 --heads 2 --width 16 --context 16 --tokenizer bytes --batch 4".split()
SMALL += "--steps 3 --dtype float32".split()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "missing.txt"], "missing.txt: No such file"),
        (["--data", "empty.txt"], "empty.txt: the file is empty"),
        (["--data", "bad.jsonl"], "bad.jsonl:2: not valid JSON"),
        (["--data", "fields.jsonl"], 'fields.jsonl:1: the fields "txt" fit no known format'),
        (["--data", "short.txt"], "must be longer than the context of 16 tokens"),
        (["--heads", "3"], "--heads must divide --width, got 3 and 16"),
        (["--micro-batch", "3"], "--micro-batch must divide --batch, got 3 and 4"),
        (["--window", "17"], "--window must be at most the context of 16, got 17"),
        (["--steps", "0"], "--steps must be in [1, inf), got 0"),
        (["--val-fraction", "1"], "--val-fraction must be in [0, 1), got 1"),
        (["--init", "nowhere"], "no checkpoint at nowhere"),
        (["--tokenizer", "nothing.json"], "nothing.json: no such tokenizer"),
        (["--out", "text.txt/run"], "--out text.txt/run: "),
        (["--out", "/proc/nowhere/run"], "/proc/nowhere"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")
    write_text(tmp_path / "short.txt", words=3)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text": \n')
    write_jsonl(tmp_path / "fields.jsonl", [{"txt": "x"}])
    arguments = command_line("pretrain", [*SMALL, *flags], data="text.txt", out="runs/run")
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()  # not even tokens


def test_a_directory_in_use_is_left_alone(tmp_path, capsys):
    run(config_for(tmp_path))
    before = files_of(tmp_path)
    arguments = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), *SMALL]
    assert cli.main(["pretrain", *arguments]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert cli.main(["pretrain", *arguments, "--resume"]) == 2  # other settings
    assert "steps was 5" in capsys.readouterr().err
    assert files_of(tmp_path) == before


def test_nan_loss_stops_with_exit_code_2(tmp_path, capsys):
    write_text(tmp_path / "text.txt")
    arguments = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), *SMALL]
    # A learning rate that overflows the weights in its second step; the first is saved.
    rate = ["--lr", "1e38", "--warmup-from", "1", "--save-every", "1", "--steps", "9"]
    assert cli.main(["pretrain", *arguments, *rate]) == 2
    error = capsys.readouterr().err
    assert "the loss is nan at step" in error and "the last good checkpoint is" in error
    assert newest_checkpoint(tmp_path / "run") is not None
    assert not (tmp_path / "run" / "final").exists()


def test_a_finished_run_resumed_says_so(tmp_path, capsys):
    run(config_for(tmp_path))
    before = files_of(tmp_path)
    resumed = RunConfig(dtype="float32", out=str(tmp_path / "run"), log_every=1, resume=True)
    assert run(config_for(tmp_path, run=resumed)) == tmp_path / "run" / "final"
    assert "nothing to resume" in capsys.readouterr().out
    assert files_of(tmp_path) == before
