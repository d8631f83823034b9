"""Right answers in free text: equal to the reference, or holding it, after space and final punctuation are
evened out.

Every question that is neither a sum nor a multiple choice comes here. A row with `"match": "contains"`
wants its `answer` somewhere in the text (a fact in a sentence); without it the whole text must be the
answer or the reference. Case counts: `str` and `STR` are not the same answer about Python. Compare SQuAD's
exact match (Rajpurkar et al. 2016), which also drops case and articles.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from caravan.evals.items import Item
from caravan.types import Message

KIND = "generate"
VERSION = 1
MAX_TOKENS = 80
CHECKED = True

EXAMPLES = (
    {"id": "x", "question": "What does len do?", "answer": "Return the number of items.", "match": "contains",
     "reference": "len: Return the number of items.", "kind": "fact"},
    {"id": "y", "question": "Capital of France?", "answer": "Paris", "kind": "word"},
)  # fmt: skip


def load(items: Sequence[Item]) -> list[Item]:
    """The questions this task answers for."""
    return [item for item in items if not item.choices and item.kind != "arithmetic"]


def prompt(item: Item) -> tuple[Message, ...]:
    """The turns before the answer."""
    return item.messages


def normal(text: str) -> str:
    """Compatibility forms (full-width letters), runs of white space and final punctuation evened out."""
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip()
    return text.rstrip(".!?。，,;；:： ").strip()


def score(item: Item, text: str) -> dict[str, float]:
    """1 for a right answer, else 0; per kind of question too."""
    given, wanted = normal(text), normal(item.answer)
    if item.row.get("match") == "contains":
        # Not inside a longer word: "the sizes" does not hold "the size". ASCII: Chinese has no such edges.
        edges = rf"(?<![A-Za-z0-9_]){re.escape(wanted)}(?![A-Za-z0-9_])"
        right = bool(wanted) and re.search(edges, given) is not None
    else:
        right = bool(given) and given in (wanted, normal(item.reference))
    return {"exact_match": float(right)}
