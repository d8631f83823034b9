"""WebGPT comparisons: {question, answer_0, answer_1, score_0, score_1}, and alike with `response_0`; equal
scores are a tie.

Also `better_response_id` (SafeRLHF) in place of scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, reader, source_of, text_of
from caravan.data.formats.kwise import is_number, ranks_of
from caravan.types import Message, Ranking

KINDS = ("preferences",)
STEMS = ("answer_", "response_", "completion_")
PROMPTS = ("question", "prompt", "instruction")


def _stem(row: dict[str, Any]) -> str | None:
    return next((s for s in STEMS if f"{s}0" in row and f"{s}1" in row), None)


def _ordered(row: dict[str, Any]) -> str | None:
    if row.keys() >= {"score_0", "score_1"}:
        return "score_0"
    return "better_response_id" if "better_response_id" in row else None


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if not isinstance(sample, dict) or not any(k in sample for k in PROMPTS):
        return None
    stem, order = _stem(sample), _ordered(sample)
    return f"records hold '{stem}0', '{stem}1' and {order!r}" if stem and order else None


def convert(row: dict[str, Any], kind: str) -> Iterator[Ranking]:
    stem, order = _stem(row), _ordered(row)
    if stem is None or order is None:
        raise Bad("two numbered answers, such as 'answer_0', and their scores")
    key = next((k for k in PROMPTS if k in row), PROMPTS[0])
    asked = row.get(key)
    question = text_of(asked, "full_text") if isinstance(asked, dict) else text_of(row, key)
    if order == "score_0":
        scores = [row["score_0"], row["score_1"]]
        if not all(map(is_number, scores)):
            raise Bad("scores that are numbers")
        ranks = ranks_of(scores)
    elif row[order] in (0, 1):
        ranks = (0, 1) if row[order] == 0 else (1, 0)
    else:
        raise Bad(f"0 or 1 under {order!r}")
    answers = (text_of(row, f"{stem}0"), text_of(row, f"{stem}1"))
    yield Ranking((Message("user", question),), answers, ranks, id_of(row), source_of(row))


read = reader(convert)
