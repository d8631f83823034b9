"""Sums: the last number of the answer must be the result, whatever stands before it.

The last number, because answers may show their work first (the "flexible" reading of GSM8K in the
lm-evaluation-harness). Thousands separators are dropped, full-width digits read as digits.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from caravan.evals.items import Item
from caravan.types import Message

KIND = "generate"
VERSION = 1
MAX_TOKENS = 64
CHECKED = True

EXAMPLES = (
    {"id": "x", "question": "12+29=?", "answer": "41", "reference": "2+9=11, 1+2+1=4, 12+29=41",
     "kind": "arithmetic"},
)  # fmt: skip

# A minus only where no digit or bracket stands before it: "52-19" holds 52 and 19, not -19.
_NUMBER = re.compile(r"((?:(?<![\d)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?)")


def load(items: Sequence[Item]) -> list[Item]:
    """The questions of kind "arithmetic"."""
    return [item for item in items if item.kind == "arithmetic" and not item.choices]


def prompt(item: Item) -> tuple[Message, ...]:
    """The turns before the answer."""
    return item.messages


def last_number(text: str) -> Decimal | None:
    """The last number written in digits, or None."""
    found = _NUMBER.findall(unicodedata.normalize("NFKC", text))
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", ""))
    except InvalidOperation:  # digits of another script that \d takes and Decimal does not
        return None


def score(item: Item, text: str) -> dict[str, float]:
    """1 if the last number is the answer's, else 0."""
    given = last_number(text)
    return {"arithmetic": float(given is not None and given == last_number(item.answer))}
