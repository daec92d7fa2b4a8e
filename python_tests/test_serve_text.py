"""From bytes to text as they come: whole characters, exact stop strings, nothing held for long."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from functools import cache

import pytest

from instructcore.scheduler import SamplingParams, _Text
from instructcore.tokenizer import TextStream, Tokenizer


class Parts:
    """A tokenizer whose ids are the parts of a text, whatever they are."""

    _adds_space = False

    def __init__(self, parts: Sequence[bytes]) -> None:
        self.token_bytes = parts.__getitem__

    def stream(self, after=()) -> TextStream:
        return TextStream(self)


@cache
def wanted(stop: tuple[str, ...], min_tokens: int) -> SamplingParams:
    return SamplingParams(stop=stop, min_tokens=min_tokens)


def spoken(parts: Sequence[bytes], stop: Iterable[str] = (), min_tokens: int = 0) -> list[str]:
    """The pieces that a stream shows: after each part, and what is left for the end."""
    text, pieces = _Text(Parts(parts), wanted(tuple(stop), min_tokens), []), []
    for i in range(len(parts)):
        stopped = text.feed(i)
        pieces.append(text.take())
        if stopped:
            break
    final = text.finish()
    pieces.append(text.take())
    assert "".join(pieces) == final
    return pieces


def oracle(parts: Sequence[bytes], stop: Sequence[str] = (), min_tokens: int = 0) -> str:
    """The text up to the stop string whose end comes first, of several there the longest.

    It is looked for in what follows the tokens that must be there.
    """
    text = b"".join(parts).decode("utf-8", "replace")
    stream = TextStream(Parts(parts))
    exempt = sum(len(stream.feed(i)) for i in range(min(min_tokens - 1, len(parts))))
    rest = text[exempt:]
    for end in range(len(rest) + 1):
        lengths = [len(s) for s in stop if rest[:end].endswith(s)]
        if lengths:
            return text[: exempt + end - max(lengths)]
    return text


ALPHABETS = [
    [bytes([b]) for b in range(256)],
    [bytes([b]) for b in b"\x00a\x80\xbf\xc0\xc2\xdf\xe0\xa0\x9f\xed\xef\xf0\x90\xf4\x8f\xf5\xff"],
    [c.encode() for c in "天地玄黄宇宙洪荒，。「」"],
    [c.encode() for c in "🙂🀄👩👧🇨🇳é\u200d\u0301a "],
    ["文".encode()[:k] for k in (1, 2, 3)] + ["🙂".encode()[:k] for k in (1, 2, 3, 4)] + [b"a"],
]  # fmt: skip


def random_parts(random: random.Random) -> list[bytes]:
    """A text of up to 16 bytes or characters, cut anywhere."""
    data = b"".join(random.choices(random.choice(ALPHABETS), k=random.randint(1, 16)))
    cuts = sorted(random.choices(range(len(data) + 1), k=random.randint(0, len(data))))
    return [data[a:b] for a, b in itertools.pairwise([0, *cuts, len(data)])]


def test_text_is_the_decoded_bytes():
    """Of 1e5 texts, valid and not, cut anywhere."""
    chance, broken = random.Random(0), 0
    for _ in range(100_000):
        parts = random_parts(chance)
        text = "".join(spoken(parts))
        assert text == b"".join(parts).decode("utf-8", "replace"), parts
        broken += "\ufffd" in text
    assert 20_000 < broken < 80_000


@pytest.mark.parametrize("text", ["abab", "aaab", "文a🙂", "a文文"])
def test_stop_strings_across_every_split(text):
    """All ways to cut the bytes, all sets of two stop strings out of the text, all min_tokens."""
    data = text.encode()
    parts_of = [text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)]
    stops = [pair for pair in itertools.combinations({*parts_of, "b文", "\ufffd"}, 2)]
    for mask in range(1 << (len(data) - 1)):
        cuts = [i + 1 for i in range(len(data) - 1) if mask >> i & 1]
        parts = [data[a:b] for a, b in itertools.pairwise([0, *cuts, len(data)])]
        for stop in stops:
            assert "".join(spoken(parts, stop)) == oracle(parts, stop), (parts, stop)


def test_stop_strings_in_any_bytes(full):
    chance = random.Random(1)
    for _ in range(200_000 if full else 5_000):
        parts = random_parts(chance)
        text = b"".join(parts).decode("utf-8", "replace")
        ends = [sorted(chance.choices(range(len(text) + 1), k=2)) for _ in range(3)]
        stop = [text[a:b] for a, b in ends if a < b] + ["a"]
        min_tokens = chance.choice((0, 0, 1, 2, 5))
        expected = oracle(parts, stop, min_tokens)
        assert "".join(spoken(parts, stop, min_tokens)) == expected, (parts, stop, min_tokens)


def test_little_is_held_back():
    """The beginning of a character, 3 bytes at most, and less than a stop string."""
    chance = random.Random(2)
    for _ in range(3_000):
        parts = random_parts(chance)
        stop = ["".join(chance.choices("a文🙂\ufffd ", k=chance.randint(1, 4)))]
        shown = 0
        for i, piece in enumerate(spoken(parts, stop)[: len(parts)]):
            known = b"".join(parts[: i + 1])
            certain = min(len(known[: len(known) - k].decode("utf-8", "replace")) for k in range(4))
            shown += len(piece)
            if stop[0] not in known.decode("utf-8", "replace"):
                assert certain - shown <= len(stop[0]) - 1, (parts, stop)


def test_pieces_come_as_soon_as_they_may():
    """A character with its last byte; what may begin a stop string once it has not."""
    smile = [bytes([b]) for b in "🙂".encode()]
    assert spoken(smile) == ["", "", "", "🙂", ""]
    assert spoken([b"a", *smile[:2], b"b"]) == ["a", "", "", "\ufffdb", ""]
    assert spoken([b"a", *smile[:3]]) == ["a", "", "", "", "\ufffd"]
    assert spoken([b"E", b"N", b"x", b"END!"], ["END"]) == ["", "", "ENx", "", ""]
    assert spoken([b"EN", b"END"], ["END"]) == ["", "EN", ""]
    tokenizer = Tokenizer.bytes()
    text = _Text(tokenizer, SamplingParams(), [])
    for id in (*"文".encode(), tokenizer.eos_id):
        text.feed(id)
    assert text.finish() == "文"
