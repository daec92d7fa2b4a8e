"""The example of a verifiable reward: which number a solution arrives at."""

from __future__ import annotations

import sys
from decimal import Decimal
from pathlib import Path

import pytest

from instructcore.evaluate import load_function

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """The function called so on the command line, found in the working directory."""
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda name: load_function(f"gsm8k_reward:{name}")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48 / 2 = 24 in May. 48 + 24 = 72.\n#### 72", "72"),
        ("#### 1,234,567", "1234567"),
        ("####$1,234.50.", "1234.5"),
        ("#### -7", "-7"),
        ("#### -$3.", "-3"),
        ("#### 5 apples, and 6 pears", "5"),  # the first one after the marker
        ("#### 4 no, wrong: #### 5!", "5"),  # the last marker
        ("#### .5", "0.5"),
        ("#### 72,", "72"),
        ("so there are 3 cats, 14 dogs.", "14"),  # without a marker: the last number
        ("it is 12 #### many", "12"),
        ("2-3", "3"),  # a difference, no negative number
        ("1,2", "2"),  # a list, no thousands
        ("3.10 dollars", "3.1"),
        ("none at all", None),
        ("####", None),
        ("", None),
    ],
)
def test_final_answer(example, text, number):
    assert example("final_answer")(text) == (None if number is None else Decimal(number))


def test_reward(example):
    records = [{"answer": f"because\n#### {n}"} for n in ("1,000", "18", "18", "18", "18")]
    responses = ["#### 1000.", "18.00", "180", "no number", "#### 8"]
    assert example("reward")([""] * 5, responses, records) == [1.0, 1.0, 0.0, 0.0, 0.0]
