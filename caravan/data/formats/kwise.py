"""Rankings: {prompt, responses: [...], ranks: [...]} with the lowest rank best (ties allowed), or scores,
higher is better; or {prompt, answers: [{answer, rank}]} as in Nectar.

In Nectar the prompt is a transcript from `Human:` to `Assistant:`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, reader, source_of
from caravan.data.formats.pairs import PROMPTS, answer_of, prompt_of
from caravan.types import Ranking

KINDS = ("preferences",)
ANSWERS = ("responses", "candidates", "answers")
TEXTS = ("answer", "response", "text", "content")


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if isinstance(sample, dict) and any(k in sample for k in PROMPTS):
        answers = next((k for k in ANSWERS if isinstance(sample.get(k), list)), None)
        order = next((k for k in ("ranks", "scores") if isinstance(sample.get(k), list)), None)
        if answers and order:
            return f"records hold {answers!r} and {order!r}"
        if answers and (inner := _inner(sample[answers])):
            return f"records hold {answers!r} with {inner[0]!r} and {inner[1]!r} each"
    return None


def _inner(answers: list[Any]) -> tuple[str, str] | None:
    """(name of the text, name of the rank or score) where every answer is an object that holds both."""
    rows = answers if answers and all(isinstance(a, dict) for a in answers) else [{}]
    text = next((k for k in TEXTS if all(isinstance(a.get(k), str) for a in rows)), None)
    order = next((k for k in ("rank", "score") if all(k in a for a in rows)), None)
    return (text, order) if text and order else None


def is_number(value: Any) -> bool:
    """A number that can be compared: no truth value, no NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def ranks_of(order: Sequence[float], higher_is_better: bool = True) -> tuple[int, ...]:
    """0 for the best, equal numbers are ties."""
    levels = sorted(set(order), reverse=higher_is_better)
    return tuple(levels.index(x) for x in order)


def convert(row: dict[str, Any], kind: str) -> Iterator[Ranking]:
    prompt = prompt_of(row)
    given = next((row[k] for k in ANSWERS if isinstance(row.get(k), list)), None)
    if given is None:
        raise Bad("a list of answers under 'responses'")
    name, order = ("ranks" if "ranks" in row else "scores"), row.get("ranks", row.get("scores"))
    if order is None and (inner := _inner(given)):
        name, order = f"{inner[1]}s", [answer[inner[1]] for answer in given]
        given = [answer[inner[0]] for answer in given]
    responses = tuple(answer_of(answer, row, prompt, "responses")[1] for answer in given)
    if not isinstance(order, list) or len(order) != len(responses):
        raise Bad(f"one rank or score for each of the {len(responses)} responses")
    if not all(map(is_number, order)):
        raise Bad("ranks or scores that are numbers")
    yield Ranking(prompt, responses, ranks_of(order, name == "scores"), id_of(row), source_of(row))


read = reader(convert)
