"""A verifiable reward for GSM8K (Cobbe et al. 2021, arXiv:2110.14168): is the final answer right?

    instructcore ppo --reward examples.gsm8k_reward:reward --prompts gsm8k_train.jsonl ...

A solution ends in "#### 1,234". The number after the last "####" counts, or the text's last number
where there is none. Numbers are compared as numbers: thousands separators, a currency sign, zeros
after the point and punctuation behind do not matter.
"""

from __future__ import annotations

import re
from decimal import Decimal

MARKER = "####"
NUMBER = re.compile(r"(?<![\w.])(-?)\$?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")


def final_answer(text: str) -> Decimal | None:
    """The number that a solution arrives at, None where it has no number."""
    _, marker, after = text.rpartition(MARKER)
    found = NUMBER.findall(after)[:1] if marker else []
    found = found or NUMBER.findall(text)[-1:]
    return Decimal("".join(found[0]).replace(",", "")) if found else None


def reward(prompts: list[str], responses: list[str], records: list[dict]) -> list[float]:
    """1 for each response whose final answer is that of its record's `answer`, else 0."""
    wanted = [final_answer(record["answer"]) for record in records]
    pairs = zip(map(final_answer, responses), wanted, strict=True)
    return [float(found is not None and found == number) for found, number in pairs]
