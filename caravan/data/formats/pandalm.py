"""PandaLM: {instruction, input, response1, response2, annotator1, …}; the majority of votes (0 tie, 1, 2).

Without a majority the two are a tie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, reader, source_of, text_of
from caravan.data.formats.alpaca import asked
from caravan.types import Message, Ranking

KINDS = ("preferences",)


def _votes(row: dict[str, Any]) -> list[Any]:
    return [row[k] for k in sorted(row) if isinstance(k, str) and k.startswith("annotator")]


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    keys = {"instruction", "response1", "response2"}
    if isinstance(sample, dict) and sample.keys() >= keys and _votes(sample):
        return "records hold 'response1', 'response2' and the votes of annotators"
    return None


def convert(row: dict[str, Any], kind: str) -> Iterator[Ranking]:
    votes = [str(v) for v in _votes(row)]
    if not votes or not set(votes) <= {"0", "1", "2"}:
        raise Bad("votes that are 0 (tie), 1 or 2 under 'annotator1', …")
    (best, count), *_ = Counter(votes).most_common()
    best = best if 2 * count > len(votes) else "0"
    prompt = (Message("user", asked(text_of(row, "instruction"), text_of(row, "input", ""))),)
    ranks = {"0": (0, 0), "1": (0, 1), "2": (1, 0)}[best]
    answers = (_answer(row, "response1"), _answer(row, "response2"))
    yield Ranking(prompt, answers, ranks, id_of(row), source_of(row))


def _answer(row: dict[str, Any], key: str) -> str:
    """A text; the released file holds some that JSON took for truth values or numbers."""
    value = row.get(key)
    return str(value) if isinstance(value, bool | int | float) else text_of(row, key)


read = reader(convert)
