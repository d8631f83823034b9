"""UltraFeedback: {instruction, completions: [{response, annotations, overall_score}]}, ranked by scores.

The score is the mean of the four aspects' ratings where all are numbers, else `fine-grained_score`, else
`overall_score`: in the first release 2,628 overall scores of 10 should mostly have been 1 (its own README).
All completions of a record are scored the same way, or the record is refused; equal scores are ties.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, reader, source_of, text_of
from caravan.data.formats.kwise import is_number, ranks_of
from caravan.types import Message, Ranking

KINDS = ("preferences",)


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    completions = sample.get("completions") if isinstance(sample, dict) else None
    if isinstance(completions, list) and all(isinstance(c, dict) and "response" in c for c in completions):
        return "records hold 'completions' with a 'response' each"
    return None


def _rated(completion: dict[str, Any]) -> float | None:
    """Mean rating over the aspects; None if one is missing ("N/A")."""
    aspects = completion.get("annotations")
    found = []
    for aspect in aspects.values() if isinstance(aspects, dict) else ():
        given = aspect.get("Rating") if isinstance(aspect, dict) else None
        try:
            found.append(float(given))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return None
    return sum(found) / len(found) if found and all(map(is_number, found)) else None


def _scores(completions: list[dict[str, Any]]) -> list[float]:
    scored: list[list[Any]] = [
        [_rated(c) for c in completions],
        [c.get("fine-grained_score") for c in completions],
        [c.get("overall_score", c.get("score")) for c in completions],
    ]
    for scores in scored:
        if all(map(is_number, scores)):
            return [round(s, 6) for s in scores]
    raise Bad("ratings or a score that is a number for every completion")


def convert(row: dict[str, Any], kind: str) -> Iterator[Ranking]:
    completions = row.get("completions")
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise Bad("a list of objects under 'completions'")
    prompt = (Message("user", text_of(row, "instruction" if "instruction" in row else "prompt")),)
    texts = tuple(text_of(c, "response") for c in completions)
    if not texts:
        raise Bad("completions that are not none")
    yield Ranking(prompt, texts, ranks_of(_scores(completions)), id_of(row), source_of(row))


read = reader(convert)
