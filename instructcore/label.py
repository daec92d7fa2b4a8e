"""Human feedback from the terminal: a person ranks K answers to each prompt, ties allowed.

As InstructGPT's labellers did (Ouyang et al. 2022, appendix B and table 3): with --likert and
--flags each answer is first graded by itself, then all of them are ranked. The answers are shown in
a random order. A ranking becomes a line of JSON, on the disk before the next prompt is shown:

    {prompt, responses: [..], ranks: [..], likert: [..]?, flags: [[..], ..]?, labeler, seed}

in the order of the samples, 1 the best rank: `reward` and `dpo` read it as it is. Samples and the
order shown are functions of (seed, prompt), so whoever goes on later finds the same answers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .config import check, check_options, group, option
from .data import Comparison, read_comparisons, read_prompts
from .errors import UserError
from .generate import Completion, Generator, SamplingParams, is_instructed
from .train import load_checkpoint, mix

FLAGS = (
    "fails the instruction", "inappropriate for an assistant", "hallucination",
    "satisfies a stated constraint", "sexual", "violent", "encourages harm",
    "denigrates a protected class", "harmful advice", "expresses opinion",
    "expresses moral judgment",
)  # fmt: skip
LINE = b'{"prompt": '  # how each line that `label` writes begins
# What a terminal would obey instead of showing, and halves of characters that it cannot show.
_UNSHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class LabelConfig:
    """Settings of `instructcore label`."""

    checkpoint: str = option("", "a checkpoint, run or quickstart", positional=True, required=True)
    prompts: str = option("", "prompts: JSONL, or one a line", required=True, metavar="FILE")
    k: int = option(4, "answers to each prompt", paper="4 to 9", range="[2, 26]")
    out: str = option("", "file that the rankings are appended to", required=True, metavar="FILE")
    likert: bool = option(False, "ask for a grade of each answer, 1 to 7")
    flags: bool = option(False, "ask which of 11 things are true of each answer")
    labeler: str = option("anonymous", "who ranks; each is asked once per prompt", metavar="NAME")
    seed: int = option(0, "of the answers and the order they are shown in", range="[0, inf)")
    sampling: SamplingParams = group(SamplingParams, hide=("n", "seed"))
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "dtype to compute in", choices=("auto", "float32", "bfloat16"))

    def __post_init__(self) -> None:
        check_options(self)


# ---- What is typed


class Skip(Exception):
    """The labeler wants the next prompt."""


def parse_ranking(line: str, k: int) -> list[int]:
    """The ranks of answers 1 .. k from "2>1=3>4", best first; a space alone is a ">"."""
    ranks: dict[int, int] = {}
    joined = re.sub(r"\s*([>=])\s*|\s+", lambda match: match[1] or ">", line.strip())
    for rank, tier in enumerate(joined.split(">"), 1):
        for word in tier.split("="):
            answer = parse_number(word, k, "an answer")
            check(answer not in ranks, f"answer {answer} is there twice")
            ranks[answer] = rank
    missing = [str(answer) for answer in range(1, k + 1) if answer not in ranks]
    check(not missing, f"answer {' and '.join(missing)} is missing")
    return [ranks[answer] for answer in range(1, k + 1)]


def parse_flags(line: str) -> list[str]:
    """The flags of "3 10", by number; none of an empty line."""
    words = re.findall(r"[^\s,]+", line)
    return [FLAGS[n - 1] for n in sorted({parse_number(x, len(FLAGS), "a flag") for x in words})]


def parse_number(word: str, highest: int, what: str) -> int:
    number = int(word) if word.isdecimal() else 0
    check(1 <= number <= highest, f"{what} is a number from 1 to {highest}, got {word!r}")
    return number


def ask(question: str, parse: Callable[[str], Any]) -> Any:
    """What the labeler types, until `parse` takes it.

    Raises:
        Skip: for "s". EOFError: for "q", or where the input ends.
    """
    while True:
        try:
            # NFKC makes of the full-width signs of a Chinese keyboard the plain ones.
            line = unicodedata.normalize("NFKC", input(question)).strip()
            if line in ("s", "q"):
                raise Skip if line == "s" else EOFError
            return parse(line)
        except ValueError as error:  # a UserError of `parse`, or bytes that are no text
            print(f"  {error}")


# ---- What is kept


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, list[Comparison]]]:
    """The file of rankings, ours alone, to append whole lines to, and what it holds.

    A kill leaves at most one line cut short, which is dropped: each is synced before the next.
    """
    with open(path, "ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {path}: another `label` is writing to it") from None
        file.seek(0)
        last = file.read().rpartition(b"\n")[2]
        whole = not last
        with suppress(ValueError):  # a line may lack its end alone
            whole = whole or bool(json.loads(last))
        if not whole:
            check(LINE.startswith(last[: len(LINE)]), f"--out {path} ends in what is no ranking")
            file.truncate(file.tell() - len(last))
            print(f"{path}: its last line was cut short and is dropped ({len(last)} bytes)")
        held = read_comparisons(path) if path.stat().st_size else []
        file.write(b"\n" if last and whole else b"")
        yield file, held


# ---- The command


def run(config: LabelConfig) -> int:
    """Asks until no prompt is left or the labeler stops; returns how many were ranked."""
    out = Path(config.out)
    check(out.parent.is_dir(), f"--out {out}: there is no such directory")
    prompts = read_prompts(config.prompts)
    model, tokenizer = load_checkpoint(config.checkpoint, config.device, config.dtype)
    generator = Generator(model, tokenizer)
    ids = generator.encode(prompts, is_instructed(model))
    ranked = 0
    with opened(out) as (file, held):
        done = {c.prompt for c in held if c.record.get("labeler") == config.labeler}
        left = {p.text: row for p, row in zip(prompts, ids, strict=True) if p.text not in done}
        print(f"{len(left)} prompts to rank; at any question, s skips the prompt and q ends")
        try:
            for number, (prompt, row) in enumerate(left.items(), 1):
                seed = prompt_seed(config.seed, prompt)
                params = replace(config.sampling, n=config.k, seed=seed)
                answers = generator.generate([row], params)
                order = torch.randperm(config.k, generator=torch.Generator().manual_seed(seed))
                show(f"{number} of {len(left)}", prompt, [answers[i] for i in order])
                with suppress(Skip):
                    labels = ask_labels(config, order.tolist())
                    record = {"prompt": prompt, "responses": [a.text for a in answers], **labels}
                    record |= {"labeler": config.labeler, "seed": config.seed}
                    line = json.dumps(record, ensure_ascii=False)
                    file.write(line.encode("utf-8", "backslashreplace") + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                    ranked += 1
        except (EOFError, KeyboardInterrupt):
            print()
    print(f"{ranked} rankings added to {out}; {len(left) - ranked} prompts are left")
    return ranked


def prompt_seed(seed: int, prompt: str) -> int:
    """The seed of a prompt's answers, wherever it stands in a file."""
    return mix(seed, *hashlib.sha256(prompt.encode("utf-8", "backslashreplace")).digest())


def show(title: str, prompt: str, answers: Sequence[Completion]) -> None:
    """Prints a prompt and the answers, numbered from 1."""
    from rich import console, panel, text

    def shown(line: str) -> text.Text:  # in which what looks like markup is none
        return text.Text(_UNSHOWN.sub("\N{REPLACEMENT CHARACTER}", line))

    screen = console.Console()
    screen.rule(title)
    screen.print(shown(prompt))
    for number, answer in enumerate(answers, 1):
        cut = "cut at the limit of tokens" if answer.finish_reason == "length" else None
        screen.print(panel.Panel(shown(answer.text), title=str(number), subtitle=cut))


def ask_labels(config: LabelConfig, order: Sequence[int]) -> dict[str, list]:
    """Grades, flags and ranks, in the order of the samples; `order` is that in which they stand."""
    k, labels = len(order), {}
    if config.flags:
        print(", ".join(f"{number} {flag}" for number, flag in enumerate(FLAGS, 1)))
    for number, index in enumerate(order, 1):
        if config.likert:
            grade = ask(
                f"answer {number}, 1 to 7 (best): ", lambda x: parse_number(x, 7, "a grade")
            )
            labels.setdefault("likert", [0] * k)[index] = grade
        if config.flags:
            flags = ask(f"answer {number}, numbers of its flags or nothing: ", parse_flags)
            labels.setdefault("flags", [[]] * k)[index] = flags
    ranks = ask("ranking, best first, as 2>1=3: ", lambda line: parse_ranking(line, k))
    return {"ranks": [ranks[order.index(index)] for index in range(k)], **labels}
