"""Ranked answers: read, rendered for a model, and cut down to what can be trained on.

A ranking is K >= 2 answers to one prompt; a pair is K = 2. What cannot be used is counted by reason, never
dropped in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from caravan.data.records import read_rankings
from caravan.data.render import Rendered, render_pair
from caravan.data.tokenizer import Tokenizer
from caravan.types import Ranking, UserError


@dataclass(frozen=True, slots=True)
class RankedGroups:
    """Rendered candidates per prompt, their ranks (0 is best, ties allowed), and what was left out and
    why."""

    groups: list[list[Rendered]]
    ranks: list[tuple[int, ...]]
    refused: dict[str, int]

    def __len__(self) -> int:
        return len(self.groups)


def load_rankings(path: Path, tok: Tokenizer, max_tokens: int) -> RankedGroups:
    """A split of a preferences artefact, rendered; empty if there is no such file."""
    return render_rankings(read_rankings(path) if path.exists() else (), tok, max_tokens)


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


def need(groups: RankedGroups, where: Path) -> RankedGroups:
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
