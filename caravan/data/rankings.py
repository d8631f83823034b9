"""Ranked answers: read, rendered for a model, and cut down to what can be trained on.

A ranking is K >= 2 answers to one prompt; a pair is K = 2. What cannot be used is counted by reason, never
dropped in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson

from caravan.data.render import Rendered, render_pair
from caravan.data.tokenizer import Tokenizer
from caravan.types import Conversation, Message, Ranking, UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RankedGroups:
    """Rendered candidates per prompt, their ranks (0 is best, ties allowed), and what was left out and
    why."""

    groups: list[list[Rendered]]
    ranks: list[tuple[int, ...]]
    refused: dict[str, int]

    def __len__(self) -> int:
        return len(self.groups)


def read_rankings(path: Path | str) -> list[Ranking]:
    """One Ranking per line: {prompt: [{role, content}], responses, ranks, id, source}. [] if there is no such
    file.

    Raises UserError naming file, line and what was expected: an artefact's files are ours, so a bad line is
    damage.
    """
    return _rows(Path(path), _ranking, "ranking: prompt, responses and ranks")


def read_conversations(path: Path | str) -> list[Conversation]:
    """One Conversation per line: {messages: [{role, content}], id, source}; errors as in `read_rankings`."""
    return _rows(Path(path), _conversation, "conversation: messages")


def _rows(path: Path, read: Callable[[dict[str, Any]], T], wanted: str) -> list[T]:
    if not path.exists():
        return []
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                rows.append(read(orjson.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}:{number}: expected a {wanted} ({error!r})",
                    "`caravan verify` tells whether the file was changed after it was made",
                ) from None
    return rows


def _messages(rows: Sequence[dict[str, str]]) -> tuple[Message, ...]:
    return tuple(Message(m["role"], m["content"]) for m in rows)


def _conversation(row: dict[str, Any]) -> Conversation:
    return Conversation(_messages(row["messages"]), row.get("id", ""), row.get("source", ""))


def _ranking(row: dict[str, Any]) -> Ranking:
    prompt = _messages(row["prompt"])
    responses, ranks = tuple(row["responses"]), tuple(int(r) for r in row["ranks"])
    if len(responses) != len(ranks) or len(responses) < 2:
        raise ValueError(f"{len(responses)} responses and {len(ranks)} ranks")
    return Ranking(prompt, responses, ranks, row.get("id", ""), row.get("source", ""))


def render_rankings(rankings: Iterable[Ranking], tok: Tokenizer, max_tokens: int) -> RankedGroups:
    """Render every candidate. Left out: candidates above `max_tokens`, equal answers under different ranks
    (the renderer may make two texts equal), prompts without a strictly ordered pair left."""
    groups: list[list[Rendered]] = []
    ranks: list[tuple[int, ...]] = []
    refused: Counter[str] = Counter()
    for ranking in rankings:
        kept: list[tuple[Rendered, int]] = []
        for response, rank in zip(ranking.responses, ranking.ranks, strict=True):
            rendered = render_pair(ranking.prompt, response, tok)
            if len(rendered) > max_tokens:
                refused["candidate longer than the context"] += 1
            elif any(rendered.ids == other.ids for other, _ in kept):
                refused["candidate twice"] += 1
            else:
                kept.append((rendered, rank))
        if len({rank for _, rank in kept}) < 2:
            refused["prompt without an ordered pair"] += 1
            continue
        groups.append([rendered for rendered, _ in kept])
        ranks.append(tuple(rank for _, rank in kept))
    return RankedGroups(groups, ranks, dict(refused))


def need(groups: RankedGroups, where: Path | str) -> RankedGroups:
    """The same, or a UserError when nothing is left to train on."""
    if not len(groups):
        why = (
            ", ".join(f"{count} x {reason}" for reason, count in groups.refused.items())
            or "the file is empty"
        )
        raise UserError(f"{where} holds no preference to train on: {why}", "look at its quarantine.jsonl")
    return groups


def response_lengths(group: Sequence[Rendered]) -> list[int]:
    """Tokens of each answer, its stop token included."""
    return [sum(rendered.mask) for rendered in group]
