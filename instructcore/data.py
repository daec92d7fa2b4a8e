"""Data: from files to packed token batches.

JSONL files of demonstrations, comparisons or prompts are read whole; the format of every line is
known by its fields, and a line that cannot be used is named as `file:line`. Pre-training text,
which may be larger than memory, is tokenised once into memory-mapped files.

A batch is `Packed`: its sequences end to end, without padding. Position p of a sequence predicts
its token p + 1, so the target of a sequence's last token is IGNORED. Every batch is a pure
function of (seed, step): to resume, nothing but the step's number is needed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .tokenizer import Tokenizer

IGNORED = -100  # the target of a token without loss
MAX_DROPPED = 0.2  # a larger share of over-long rows is an error, not a loss to be borne
Paths = str | Path | Sequence[str | Path]
T = TypeVar("T")


def pieces(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive pieces of `size` items, the last one perhaps shorter."""
    return (items[first : first + size] for first in range(0, len(items), size))


class Turn(NamedTuple):
    """A part of a conversation; responses are what a model learns to write."""

    text: str
    is_response: bool


class Demonstration(NamedTuple):
    """A conversation that shows how to respond; `where` is its file:line."""

    turns: tuple[Turn, ...]
    record: dict
    where: str = ""


class Comparison(NamedTuple):
    """Responses to one prompt; the lower a rank the better, equal ranks are a tie."""

    prompt: str
    responses: tuple[str, ...]
    ranks: tuple[float, ...]
    record: dict
    where: str = ""


class Prompt(NamedTuple):
    """A prompt; `record` is its whole JSON line, for reward functions."""

    text: str
    record: dict
    where: str = ""


class Packed(NamedTuple):
    """Sequences end to end; the parts that attention keeps apart lie between cu_seqlens."""

    tokens: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (B + 1,) int32: 0, the end of each sequence, the last of them N
    targets: Tensor  # (N,) int64, the next token or IGNORED
    max_seqlen: int


# ---- Files of records

DEMONSTRATIONS = (
    "{instruction, input?, output}, {messages: [{role, content}]}, "
    "{conversations: [{from, value}]}, {prompt, completion|response}, {question, answer}"
)
COMPARISONS = (
    "{prompt, chosen, rejected}, {prompt, responses: [..], ranks: [..]} (1 is best), "
    "{prompt, responses: [..], scores: [..]} (more is better), "
    "{question, <any name>: {solution, is_correct}, ..}"
)
PROMPTS = "{prompt}, {instruction, input?}, {question}, {messages: [{role, content}]}"

# Two messages of one side are parted by an empty line, as are an instruction and its input.
JOINT = "\n\n"
_RESPONSES = ("completion", "response", "output", "answer")
_ROLES = ("assistant", "gpt", "user", "human", "system", "developer")  # the first two respond


def read_demonstrations(paths: Paths) -> list[Demonstration]:
    """All demonstrations of JSONL files, in one of the formats DEMONSTRATIONS."""
    return _read(paths, _demonstration)


def read_comparisons(paths: Paths) -> list[Comparison]:
    """All comparisons of JSONL files, in one of the formats COMPARISONS."""
    return _read(paths, _comparison)


def read_prompts(paths: Paths) -> list[Prompt]:
    """All prompts of JSONL files in one of the formats PROMPTS, or of text files, one a line.

    Of a conversation, the prompt is what comes before the first response.
    """
    return _read(paths, _prompt, plain=True)


def read_documents(paths: Paths) -> Iterator[str]:
    """The texts of pre-training files: of JSONL the {text} of each line, plain text in pieces."""
    for path in _paths(paths):
        with _open(path) as file:
            yield from _texts(path, file)


def read_conversation(messages: Any, where: str = "messages") -> list[Turn]:
    """The turns of [{role, content}], neighbouring prompts made one."""
    return _Row(where, {"messages": messages}).conversation() or []


class _Row(NamedTuple):
    """A line of a file, and how to complain about it."""

    where: str
    record: dict

    def error(self, message: str) -> UserError:
        return UserError(f"{self.where}: {message}")

    def unknown(self, what: str, formats: str) -> UserError:
        fields = ", ".join(map(_shown, self.record)) or "(none)"
        return self.error(f"the fields {fields} fit no known format of {what}, which are {formats}")

    def field(self, *names: str) -> str | None:
        """The first of these fields that the line has."""
        return next((name for name in names if name in self.record), None)

    def text(self, field: str) -> str:
        value = self.record[field]
        if not isinstance(value, str):
            raise self.error(f'"{field}" must be a string, got {_shown(value)}')
        return value

    def prompt(self) -> str | None:
        """The text that asks for a response; None if no field has it."""
        field = self.field("prompt", "instruction", "question")
        if field is None:
            return None
        text = self.text(field)
        if field == "instruction" and self.record.get("input"):
            text += JOINT + self.text("input")
        return text

    def conversation(self) -> list[Turn] | None:
        """Its turns, neighbouring prompts made one; None if it is no conversation."""
        field = self.field("messages", "conversations")
        if field is None:
            return None
        messages = self.record[field]
        if not isinstance(messages, list) or not messages:
            raise self.error(f'"{field}" must be a list of messages, got {_shown(messages)}')
        turns: list[Turn] = []
        for number, message in enumerate(messages, 1):
            turn = self._turn(f"{field}, message {number}", message)
            if turns and not turn.is_response and not turns[-1].is_response:
                turn = Turn(turns.pop().text + JOINT + turn.text, False)
            turns.append(turn)
        return turns

    def _turn(self, name: str, message: Any) -> Turn:
        fields = message if isinstance(message, dict) else {}
        role = fields.get("role", fields.get("from"))
        text = fields.get("content", fields.get("value"))
        if _is_list(text, dict) and all(_is_text(part) for part in text):
            text = "".join(part["text"] for part in text)
        if not isinstance(role, str) or not isinstance(text, str):
            want = "{role, content} or {from, value}, two strings (or parts {type: text, text})"
            raise self.error(f"{name} must have {want}, got {_shown(message)}")
        if role not in _ROLES:
            raise self.error(f"{name}: role must be one of {', '.join(_ROLES)}, got {_shown(role)}")
        return Turn(text, role in _ROLES[:2])


def _is_text(part: dict) -> bool:
    """Whether a part of a message is {type: "text", text} and nothing else."""
    text = part.get("text")
    return part == {"type": "text", "text": text} and isinstance(text, str)


def _demonstration(row: _Row) -> Demonstration:
    turns = row.conversation()
    if turns is None:
        prompt, field = row.prompt(), row.field(*_RESPONSES)
        if prompt is None or field is None:
            raise row.unknown("demonstrations", DEMONSTRATIONS)
        turns = [Turn(prompt, False), Turn(row.text(field), True)]
    while turns and not turns[-1].is_response:
        turns.pop()
    if not turns:
        raise row.error("the conversation has no message of the assistant: nothing to learn")
    return Demonstration(tuple(turns), row.record, row.where)


def is_demonstration(prompt: Prompt) -> bool:
    """Whether the line that a prompt was read from has a response, too."""
    row = _Row(prompt.where, prompt.record)
    turns = row.conversation()
    return any(t.is_response for t in turns) if turns else row.field(*_RESPONSES) is not None


def _comparison(row: _Row) -> Comparison:
    prompt, record = row.prompt(), row.record
    if prompt is None:
        raise row.unknown("comparisons", COMPARISONS)
    graded = [v for v in record.values() if isinstance(v, dict) and "is_correct" in v]
    has, sign = record.keys(), -1  # more is better
    if has >= {"chosen", "rejected"}:
        responses, values = [record["chosen"], record["rejected"]], [1, 0]
    elif has >= {"responses", "ranks"}:
        responses, values, sign = record["responses"], record["ranks"], 1
    elif has >= {"responses", "scores"}:
        responses, values = record["responses"], record["scores"]
    elif graded:
        responses, values = [v.get("solution") for v in graded], [v["is_correct"] for v in graded]
    else:
        raise row.unknown("comparisons", COMPARISONS)
    if not _is_list(responses, str) or len(responses) < 2:
        raise row.error(f"the responses must be at least 2 strings, got {_shown(responses)}")
    finite = _is_list(values, (int, float)) and all(abs(v) < 1e300 for v in values)
    if not finite or len(values) != len(responses):
        want = f"{len(responses)} finite numbers, one per response"
        raise row.error(f"the ranks, scores or grades must be {want}, got {_shown(values)}")
    ranks = tuple(0.0 + sign * value for value in values)
    return Comparison(prompt, tuple(responses), ranks, record, row.where)


def _prompt(row: _Row) -> Prompt:
    text = row.prompt()
    if text is None:
        turns = row.conversation()
        if turns is None:
            raise row.unknown("prompts", PROMPTS)
        if turns[0].is_response:
            raise row.error("the conversation must begin with a message of the user")
        text = turns[0].text
    return Prompt(text, row.record, row.where)


def _read(paths: Paths, convert: Callable[[_Row], Any], plain: bool = False) -> list:
    items: list = []
    for path in _paths(paths):
        with _open(path) as file:
            items.extend(map(convert, _rows(path, file, jsonl=not plain or _is_jsonl(path))))
    if not items:
        raise UserError(f"{path}: nothing but empty lines")
    return items


def _rows(path: Path, file: TextIO, jsonl: bool = True) -> Iterator[_Row]:
    for number, line in enumerate(file, 1):
        if line := line.strip():
            where = f"{path}:{number}"
            yield _Row(where, _parse(where, line) if jsonl else {"prompt": line})


def _parse(where: str, line: str) -> dict:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = "; an array becomes lines with `jq -c '.[]' FILE`" if line[0] == "[" else ""
        message = str(error).replace("line 1 ", "")  # of the file it may be another
        raise UserError(f"{where}: not valid JSON: {message}{hint}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: a line must be one JSON object, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _is_list(value: Any, of: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(item, of) for item in value)


def _paths(paths: Paths) -> list[Path]:
    """The paths; a UserError before any is read if one cannot be."""
    files = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    if not files:
        raise UserError("no data files are given")
    for file in files:
        with _open(file):
            pass
    return files


@contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    """The file as text: UTF-8 with or without its mark, any line ends."""
    try:
        file = open(path, encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    with file:
        if not os.fstat(file.fileno()).st_size:
            raise UserError(f"{path}: the file is empty")
        try:
            yield file
        except UnicodeDecodeError:
            raise UserError(f"{path}:{_undecodable_line(path)}: not valid UTF-8") from None


def _undecodable_line(path: Path) -> int:
    with open(path, "rb") as file:
        lines = enumerate(file, 1)
        return next((n for n, line in lines if line.decode(errors="ignore").encode() != line), 0)


def read_jsonl(path: Path) -> list[Any]:
    """The value of every line of a file that this package wrote."""
    with path.open(encoding="utf-8") as file:  # not splitlines: texts may hold U+2028
        return [json.loads(line) for line in file]


def _is_jsonl(path: Path) -> bool:
    """By its name, or else because it begins as a JSON object does."""
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        return True
    with _open(path) as file:
        return bool(re.match(r'\s*\{\s*"', file.read(1024)))


# ---- Demonstrations as tokens


def encode_demonstrations(
    demonstrations: Sequence[Demonstration],
    tokenizer: Tokenizer,
    context: int,
    overlong: str,
    *,
    marked: bool = True,
) -> list[tuple[list[int], list[bool]]]:
    """(ids, mask) of each: `prompt <|assistant|> response <|eos|>`, turn after turn.

    The mask is True on the tokens to learn: the responses, and the EOS that ends each of them.

    Args:
        overlong: what becomes of rows longer than `context` tokens. "drop": left out and reported,
            an error if they are more than a fifth. "truncate": cut, and left out if no response
            remains. "error": an error.
        marked: with the assistant marker before each response; a base model knows none.
    """
    if overlong not in ("drop", "truncate", "error"):
        raise UserError(f"overlong must be one of drop, truncate, error, got {overlong!r}")
    texts = [turn.text for demonstration in demonstrations for turn in demonstration.turns]
    encoded = iter(tokenizer.encode_batch(texts))
    marker = [tokenizer.assistant_id] if marked and tokenizer.assistant_id is not None else []
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    rows = []
    for demonstration in demonstrations:
        ids: list[int] = []
        mask: list[bool] = []
        for turn in demonstration.turns:
            part = next(encoded)
            given, learnt = (marker, part + end) if turn.is_response else (part, [])
            ids += given + learnt
            mask += [False] * len(given) + [True] * len(learnt)
        if len(ids) > context:
            if overlong == "error":
                where = demonstration.where or "a demonstration"
                raise UserError(f"{where}: {len(ids)} tokens, more than the context of {context}")
            if overlong == "drop" or not any(mask[:context]):
                continue
        rows.append((ids[:context], mask[:context]))
    report_dropped(len(demonstrations) - len(rows), len(demonstrations), "demonstrations", context)
    return rows


def encode_conversation(turns: Sequence[Turn], tokenizer: Tokenizer, *, marked: bool) -> list[int]:
    """Ids of a conversation of any length, which the assistant is to go on with."""
    said, limits = [Demonstration(tuple(turns), {})], (sys.maxsize, "error")
    ((ids, _),) = encode_demonstrations(said, tokenizer, *limits, marked=marked)
    return ids + (tokenizer.prompt_ids("") if marked else [])


def report_dropped(
    dropped: int,
    total: int,
    what: str,
    context: int,
    remedy: str = "shorten them, train with a larger context, or see --overlong",
) -> None:
    """Says on stderr how many over-long rows are left out; a UserError if more than MAX_DROPPED."""
    message = f"{dropped} of {total} {what} do not fit the context of {context} tokens"
    if dropped > MAX_DROPPED * total:
        raise UserError(f"{message}, more than {MAX_DROPPED:.0%} of them: {remedy}")
    if dropped:
        print(f"{message}: left out", file=sys.stderr)


# ---- Packing and order


def pack(sequences: Sequence[tuple[Sequence[int], Sequence[bool] | None]]) -> Packed:
    """Sequences end to end. Each is (ids, mask); mask[i]: is ids[i] a target? None: all are.

    The first token of a sequence is no target: nothing comes before it.
    """
    lengths = [len(ids) for ids, _ in sequences]
    masks = [np.ones(len(ids), bool) if m is None else np.asarray(m, bool) for ids, m in sequences]
    if not lengths or not min(lengths) or [len(mask) for mask in masks] != lengths:
        raise ValueError(f"pack: needs tokens, and masks as long, got sequences of {lengths}")
    tokens = np.concatenate([np.asarray(ids, np.int64) for ids, _ in sequences])
    ends = np.cumsum(lengths)
    learn = np.concatenate(masks)
    targets = np.full_like(tokens, IGNORED)
    targets[:-1][learn[1:]] = tokens[1:][learn[1:]]
    targets[ends - 1] = IGNORED
    return _packed(tokens, np.concatenate([[0], ends]), targets)


def _packed(tokens: np.ndarray, cuts: np.ndarray, targets: np.ndarray) -> Packed:
    tensor, longest = torch.from_numpy, int(np.diff(cuts).max())
    return Packed(tensor(tokens), tensor(cuts.astype(np.int32)), tensor(targets), longest)


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, 0)).permutation(n)


class EpochOrder:
    """The items 0 .. n - 1 in a new order every epoch, which (seed, epoch) alone decide."""

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise ValueError(f"EpochOrder: n must be at least 1, got {n}")
        self.n, self.seed = n, seed

    def batch(self, step: int, size: int) -> list[int]:
        """The items of batch `step`; one batch may end an epoch and begin the next."""
        items: list[int] = []
        position = step * size
        while len(items) < size:
            epoch, first = divmod(position + len(items), self.n)
            order = _permutation(self.n, self.seed, epoch)
            items += order[first : first + size - len(items)].tolist()
        return items


# ---- Pre-training text

PIECE = 1 << 16  # characters of plain text that are tokenised as one
BATCH = 1 << 20  # characters in memory at once
FORMAT = 1  # of the files in the cache
# Where text can be cut so that its parts have the tokens of the whole: after a line that is
# followed by text at once, or before a word. Without spaces any place serves; it costs a token.
_CUTS = (re.compile(r"(?<=\S)\n(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))
Progress = Callable[[int, int], Any]  # is told the bytes read so far, and all


class TokenStream:
    """Tokens of text, end to end in a memory-mapped file, and where its documents begin.

    A plain text file is one document. A {text} line of a JSONL file is one, too, and ends in EOS.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, name: str = "text") -> None:
        """tokens (n,) of an unsigned dtype; starts (documents,) int64, ascending from 0."""
        self.tokens, self.starts, self.name = tokens, starts, name

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def build(
        cls,
        paths: Paths,
        tokenizer: Tokenizer,
        directory: str | Path,
        val_fraction: float,
        progress: Progress = lambda done, total: None,
        *,
        window: int = 1,
    ) -> tuple[TokenStream, TokenStream]:
        """(training, held-out) tokens of text files of any size, tokenised once.

        Of the n tokens of a plain text file the first int(n (1 − val_fraction)) are for training,
        of the documents of a JSONL file likewise, but at least one. `directory` keeps the tokens
        for the same files, tokenizer and fraction. They appear there complete or not at all; a
        second process that builds the same waits for the first. The training text must hold a
        window of `window` tokens; after this error, or another, a new `directory` is gone again.
        """
        paths = _paths(paths)
        if not 0 <= val_fraction < 1:
            raise UserError(f"val_fraction must be in [0, 1), got {val_fraction}")
        built = Path(directory) / _cache_key(paths, tokenizer, val_fraction)
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        with _made(built.parent), open(built.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not built.is_dir():
                partial = built.with_name("partial")  # of whichever build was cut short
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)  # the one waited for may have failed, and cleaned up
                _tokenise(paths, tokenizer, partial, dtype, val_fraction, progress)
                os.rename(partial, built)
            train, val = (
                cls(_map(built / part, dtype), _map(built / f"{part}.starts", np.int64), name)
                for part, name in (("train", "training text"), ("val", "held-out text"))
            )
            if len(train) < 2 or (val_fraction and len(val) < 2):
                parts = f"{len(train)} tokens to train on and {len(val)} held out"
                raise UserError(f"{paths[-1]}: too little text: {parts}; either needs at least 2")
            train.batch(0, 0, 1, window)
        return train, val

    def batch(self, step: int, seed: int, batch: int, context: int) -> Packed:
        """`batch` windows of `context` tokens from random places, which (seed, step) decide."""
        places = len(self) - context
        if places < 1:
            want = f"longer than the context of {context} tokens"
            raise UserError(f"the {self.name} must be {want}, got {len(self)} tokens")
        first = np.random.default_rng((seed, step, 1)).integers(places, size=batch)
        return self._windows(first, context)

    def windows(self, context: int, batch: int) -> Iterator[Packed]:
        """All tokens but the first as targets, once each: consecutive windows of `context` tokens.

        `batch` of them at once; then fewer, and the rest that fills no window as one by itself.
        """
        full, rest = divmod(max(0, len(self) - 1), context)
        for begin in range(0, full, batch):
            yield self._windows(np.arange(begin, min(begin + batch, full)) * context, context)
        if rest:
            yield self._windows(np.array([full * context]), rest)

    def _windows(self, first: np.ndarray, context: int) -> Packed:
        """The windows that begin at `first` (B,), cut where a document ends."""
        rows = self.tokens[first[:, None] + np.arange(context + 1)].astype(np.int64)
        tokens, targets = rows[:, :-1].flatten(), rows[:, 1:].flatten()  # copies, always
        cuts = np.arange(len(first) + 1) * context
        # Documents that begin after a window's first token, up to its last target.
        begin = np.searchsorted(self.starts, first, "right")
        count = np.searchsorted(self.starts, first + context, "right") - begin
        if count.any():
            row = np.repeat(np.arange(len(first)), count)
            index = np.arange(len(row)) - (np.cumsum(count) - count)[row] + begin[row]
            inner = self.starts[index] - first[row] + row * context
            targets[inner - 1] = IGNORED
            cuts = np.unique(np.concatenate([cuts, inner]))
        return _packed(tokens, cuts, targets)


@contextmanager
def _made(directory: Path) -> Iterator[None]:
    """Makes a directory; after an error it is gone, with those above that were made for it."""
    above = (directory, *directory.parents)
    new = [p for p in above if not p.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except Exception:
        if new:
            shutil.rmtree(directory, ignore_errors=True)
        with suppress(OSError):  # not empty: another process has found a use for it
            for path in new[1:]:
                path.rmdir()
        raise


def _texts(path: Path, file: TextIO) -> Iterator[str]:
    """The texts of an open file: those of its lines if it is JSONL, else the file in pieces."""
    if _is_jsonl(path):
        for row in _rows(path, file):
            if "text" not in row.record:
                raise row.unknown("pre-training documents", "{text}")
            if text := row.text("text"):
                yield text
        return
    text = ""
    while chunk := file.read(PIECE):
        text += chunk
        cut = _cut(text)
        yield text[:cut]
        text = text[cut:]
    if text:
        yield text


def _cut(text: str) -> int:
    """The last good place to cut a text."""
    for pattern in _CUTS:
        places = [match.end() for match in pattern.finditer(text, max(1, len(text) - 4096))]
        if places:
            return places[-1]
    return len(text)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about BATCH characters."""
    part, size = [], 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= BATCH:
            yield part
            part, size = [], 0
    if part:
        yield part


def _tokenise(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    directory: Path,
    dtype: type,
    val_fraction: float,
    progress: Progress,
) -> None:
    """Writes train, train.starts, val and val.starts; each input passes through a file of its own,
    because where to split it is known only at its end."""
    end = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], np.int64)
    scratch = directory / "tokens", directory / "starts"
    done, total = 0, sum(path.stat().st_size for path in paths)
    for path in paths:
        jsonl, n = _is_jsonl(path), 0
        with _open(path) as file, open(scratch[0], "wb") as out, open(scratch[1], "wb") as begins:
            for texts in _batches(_texts(path, file)):
                for ids in _encode(texts, tokenizer):
                    if jsonl:
                        ids = np.append(ids, end)
                        begins.write(n.to_bytes(8, sys.byteorder))
                    out.write(ids.astype(dtype).data)
                    n += len(ids)
                progress(done + file.buffer.tell(), total)
        done += path.stat().st_size
        tokens, starts, kept = _map(scratch[0], dtype), _map(scratch[1], np.int64), 1
        if jsonl:
            kept = max(1, int(len(starts) * (1 - val_fraction)))
            split = int(starts[kept]) if kept < len(starts) else n
        else:
            split = int(n * (1 - val_fraction))
            starts = np.array([0, split])
        _append(directory / "train", tokens[:split], starts[:kept])
        _append(directory / "val", tokens[split:], starts[kept:] - split)
    for path in scratch:
        path.unlink()


def _append(path: Path, tokens: np.ndarray, starts: np.ndarray) -> None:
    with open(path, "ab") as file, open(f"{path}.starts", "ab") as starts_file:
        starts_file.write((starts + file.tell() // tokens.itemsize).data)
        file.write(tokens.data)
        for written in file, starts_file:
            written.flush()
            os.fsync(written.fileno())


def _encode(texts: list[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    if tokenizer.kind == "bytes":  # the id of a byte is the byte
        return [np.frombuffer(text.encode("utf-8", "replace"), np.uint8) for text in texts]
    return [np.array(ids, np.int64) for ids in tokenizer.encode_batch(texts)]


def _cache_key(paths: Sequence[Path], tokenizer: Tokenizer, val_fraction: float) -> str:
    """What the tokens depend on, as a name: files by size and time, tokenizer by content."""
    status = [(path.resolve(), path.stat()) for path in paths]
    files = [[str(path), s.st_size, s.st_mtime_ns] for path, s in status]
    digest = hashlib.sha256(json.dumps([FORMAT, val_fraction, files]).encode())
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save(directory)
        for file in sorted(Path(directory).iterdir()):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:20]


def _map(path: Path, dtype: type) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)
