"""What the READMEs show exists: commands parse, snippets run, and both languages show the same."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest

from instructcore import cli
from instructcore.config import unflatten
from instructcore.model import GPT, ModelConfig
from instructcore.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
README, CHINESE = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh.md"))
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(text) if name == language]


def commands(text: str) -> list[list[str]]:
    """The words of every shell command shown, in blocks of sh and in `code` within lines."""
    lines = "".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:instructcore|python|pip|make) [^`]*)`", FENCE.sub("", text))
    parts = [part for line in lines for part in line.split(" && ")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def snippet(text: str, holding: str) -> str:
    (found,) = (body for body in blocks(text, "python") if holding in body)
    return found


def run(code: str) -> tuple[dict, str]:
    """(the names it defines, what it prints)"""
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), names)
    return names, printed.getvalue()


SHOWN = [words[1:] for words in commands(README) if words[0] == "instructcore"]


@pytest.mark.parametrize("words", SHOWN, ids=" ".join)
def test_command(words):
    name, *rest = words
    command = cli.COMMANDS[name]
    config = getattr(importlib.import_module(f"instructcore.{command.module}"), command.config)
    parser = cli.make_parser(name, command.help, config)
    if rest != ["--help"]:
        unflatten(config, vars(parser.parse_args(rest)))  # which checks the settings too


def test_every_command_is_shown():
    assert {words[0] for words in SHOWN} == set(cli.COMMANDS)


def test_drop_in_learns():
    names, printed = run(snippet(README, "ppo_loss("))
    assert names["rewards"].mean() > 0.8, printed


def test_adapter_learns():
    pytest.importorskip("transformers", reason="transformers is not installed")
    names, printed = run(snippet(README, "adapters.transformers"))
    assert names["loss"] < 1.5 and "-> instructcore.adapters.transformers" in printed
    assert names["model"].config._attn_implementation == "sdpa"


def test_api(tmp_path, monkeypatch):
    tokenizer = Tokenizer.bytes()
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, layers=1, heads=2, width=16, context=64)
    GPT(shape).save(tmp_path / "runs/sft/final", tokenizer)
    monkeypatch.chdir(tmp_path)
    names, printed = run(snippet(README, "Generator("))
    assert names["logits"].shape == (len(names["tokens"]), tokenizer.vocab_size)
    assert len(printed.splitlines()) >= 2


def test_reward_function():
    reward = run(snippet(README, "# rewards.py"))[0]["last_number"]
    record = {"question": "6 times 7?", "answer": "6 * 7 = 42\n#### 42"}
    assert reward(["?"] * 3, ["It is 42", "42 or 41", ""], [record] * 3) == [1.0, 0.0, 0.0]


def test_both_languages_show_the_same():
    assert commands(CHINESE) == commands(README)
    assert blocks(CHINESE, "python") == blocks(README, "python")
    levels, markers = r"^(#+) ", r"<!-- .* -->"
    for pattern in (levels, markers, r"\[[^]]+\]\((?!README|#)([^)]+)\)"):
        found = [
            re.findall(pattern, FENCE.sub("", text), re.MULTILINE) for text in (README, CHINESE)
        ]
        assert found[0] == found[1]


@pytest.mark.parametrize("text", [README, CHINESE], ids=["README.md", "README.zh.md"])
def test_links_lead_somewhere(text):
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
            assert target[1:] in [
                re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles
            ]
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target
