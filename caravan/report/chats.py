"""What a page says about conversations and preferences: lengths, turns, languages, formats, and what was left
out, all from the facts of the stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from caravan.report import draw, plots, read
from caravan.store import Artefact

KINDS = ("conversations", "preferences")
LENGTHS = {
    "question_chars": "questions",
    "prompt_chars": "prompts",
    "answer_chars_spread": "answers",
    "answer_chars": "answers",
}
COUNTED = {
    "conversations": "conversations",
    "rankings": "rankings",
    "labels": "labelled answers",
    "pairs": "pairs",
    "prompts": "prompts",
    "multi_turn": "of several turns",
    "with_system": "with a system message",
    "with_tools": "with tools",
    "tool_calls": "calls of tools",
    "kwise": "with more than two answers",
    "with_ties": "with ties",
    "duplicates": "equal ones met again",
    "near_duplicates": "near duplicates",
    "contaminated": "with an item of a benchmark",
    "removed": "removed",
    "quarantined": "in quarantine",
}
"""Fact -> words, in this order; nothing is said of what there is none of, but for these."""
ALWAYS = ("removed", "quarantined")
LEFT = ("conversations", "rankings", "labels")


def section(art: Artefact, name: str) -> dict[str, Any]:
    """Everything the template says about one artefact of chats."""
    facts = art.facts
    return {
        "name": name,
        "counts": [
            (f"{facts[k]:,}", words)
            for k, words in COUNTED.items()
            if isinstance(facts.get(k), int) and (facts[k] or k in ALWAYS)
        ],
        "flow": _flow(art, name),
        "longer": facts.get("better_is_longer"),
        "lengths": list(_lengths(facts)),
        "tables": [
            {"title": title, "rows": _bars(facts[key])}
            for title, key in (
                ("Languages", "languages"),
                ("Answers per conversation", "answers_per_conversation"),
                ("Files by format", "formats"),
                ("Why records are in quarantine", "quarantined_why"),
            )
            if isinstance(facts.get(key), Mapping) and facts[key]
        ],
    }


def _flow(art: Artefact, name: str) -> str:
    """A band of what was read: what was malformed, met again or removed by a rule, and what is left. Nothing
    where all of it is left."""
    facts = art.facts
    gone = Counter({f"expected: {why}": int(n) for why, n in (facts.get("quarantined_why") or {}).items()})
    gone["otherwise malformed"] = int(facts.get("quarantined", 0)) - gone.total()
    gone["equal ones met again"] = int(facts.get("duplicates", 0))
    gone.update(str(row.get("rule", "")) for row in read.rows(art / "removed.jsonl"))
    left = sum(int(facts.get(k, 0)) for k in LEFT)
    taken = tuple((rule, float(n)) for rule, n in gone.most_common() if n > 0)
    came = left + sum(n for _, n in taken)
    stop = plots.Stop(name=name, came=came, gone=taken, left=left)
    return plots.sankey([stop], "records", draw.number) if taken else ""


def _lengths(facts: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """(what, median, nine in ten, all but one in a hundred, longest), characters."""
    for key, what in LENGTHS.items():
        spread = facts.get(key)
        if isinstance(spread, Mapping) and spread:
            yield what, [f"{int(spread.get(k, 0)):,}" for k in ("p50", "p90", "p99", "max")]


def _bars(counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Names with counts, shares and bars, as they stand in the facts."""
    whole = sum(map(int, counts.values())) or 1
    most = max(map(int, counts.values())) or 1
    return [
        {"name": read.clip(str(k), 160), "count": f"{int(v):,}", "share": f"{v / whole:.1%}",
         "bar": draw.bar(int(v) / most)}
        for k, v in counts.items()
    ]  # fmt: skip
