"""Which source reads when: weights per source and phase of a run become an exact, evenly spread timetable.

Shares are rounded to whole rows by largest remainders (Hamilton's method), so what is realised is what was
asked for, not a draw around it. Inside a phase of L rows source s has c_s of them, spread as evenly as
rounding allows: of the first i rows it has

    round(i c_1 / L) for the largest source, and so on for the others within the rows it leaves,

(Bresenham's line, once per source). After any number of rows no source is more than (S - 1)/2 rows away from
its share, S the number of sources; a random order would be away by the square root of the rows. The source of
row g and its number there are arithmetic on g: resuming costs nothing, and no list is kept.

    weights      a share of the tokens: 3,1 is 75 % and 25 %
    epochs       how often each source is read: 1,4 on 90 and 10 tokens is 90 and 40
    temperature  without weights: share of s ~ tokens_s ^ alpha. 1: by size. 0.3 to 0.7 lifts small languages
                 (Devlin et al. 2019, Conneau et al. 2020). 0: all alike
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np

from caravan.types import UserError

ANNEAL = "anneal"


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a run and how its tokens are shared out."""

    share: float
    """Of the run's steps."""
    weights: tuple[float, ...]
    """One per source, of any sum; what they weigh (tokens or epochs) is said elsewhere."""


def parse(texts: Sequence[str], sources: int, anneal_share: float) -> list[Phase]:
    """`0.7:3,1` is a phase of 70 % of the steps with weights 3 and 1; without a share it takes what the
    others leave; `anneal:1,4` comes last and lasts as long as the learning rate falls. Raises UserError."""
    read: list[tuple[float | None, tuple[float, ...]]] = []
    for at, text in enumerate(texts):
        head, colon, tail = text.rpartition(":")
        if head == ANNEAL and at != len(texts) - 1:
            raise UserError(f"`{text}` must be the last phase", "the rate falls at the end of a run")
        try:
            weights = tuple(float(w) for w in tail.split(","))
            share = None if not colon else anneal_share if head == ANNEAL else float(head)
        except ValueError as error:
            raise UserError(f"the phase `{text}` cannot be read", "write share:weight,weight,...") from error
        if len(weights) != sources:
            raise UserError(f"`{text}` has {len(weights)} weights for {sources} sources", "one per --shards")
        if any(not (0 <= w < math.inf) for w in weights) or not any(weights):
            raise UserError(f"`{text}`: weights are numbers from 0 on, not all 0")
        if share is not None and not 0 < share <= 1:
            raise UserError(f"`{text}`: a phase is a share of the run, above 0 and at most 1")
        read.append((share, weights))
    open_ones = sum(share is None for share, _ in read)
    left = 1 - sum(share for share, _ in read if share is not None)
    if open_ones > 1 or (open_ones and left <= 0) or (not open_ones and abs(left) > 1e-6):
        raise UserError(
            f"the phases cover {1 - left:.4g} of the run", "shares add up to 1; one phase may go without"
        )
    return [Phase(left if share is None else share, weights) for share, weights in read]


def temperature(tokens: Sequence[int], alpha: float) -> tuple[float, ...]:
    """Weights ~ tokens^alpha, of sum 1. Raises UserError for an alpha below 0 or none."""
    if not 0 <= alpha < math.inf:
        raise UserError(
            f"sources cannot be weighed by tokens ^ {alpha}", "give --mix-alpha from 0 on; 1 is by size"
        )
    raised = [float(n) ** alpha if n else 0.0 for n in tokens]
    return tuple(w / math.fsum(raised) for w in raised)


def token_shares(weights: Sequence[float], tokens: Sequence[int], by: str) -> tuple[float, ...]:
    """Shares of the tokens, of sum 1, from weights by `proportion` or by `epochs`."""
    raw = [w * n for w, n in zip(weights, tokens, strict=True)] if by == "epochs" else list(weights)
    return tuple(w / math.fsum(raw) for w in raw)


def apportion(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Whole numbers of sum `total` in proportion to the weights: largest remainders, ties to the first."""
    exact = [Fraction(w) for w in weights]
    quotas = [w * total / sum(exact) for w in exact]
    counts = [int(q) for q in quotas]
    order = sorted(range(len(counts)), key=lambda s: (counts[s] - quotas[s], s))
    for s in order[: total - sum(counts)]:
        counts[s] += 1
    return tuple(counts)


class Timetable:
    """The source of each row of a run, and the how-manieth of that source it is.

    `phases`: rows per source in each. Rows past the last phase repeat it.
    """

    def __init__(self, phases: Sequence[Sequence[int]]) -> None:
        kept = [tuple(counts) for counts in phases if sum(counts)]
        assert kept, "a timetable needs rows"
        self._phases = kept
        self._starts = [0, *accumulate(map(sum, kept))]
        self._before = [tuple(map(sum, zip(*kept[:j], strict=True))) for j in range(1, len(kept))]
        self._before.insert(0, (0,) * len(kept[0]))

    def of(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, number within it) int64 of rows [start, stop). Exact for any row: Python's integers."""
        found = [self._at(row) for row in range(start, stop)]
        out = np.array(found, np.int64).reshape(-1, 2)
        return out[:, 0], out[:, 1]

    def counts(self, row: int) -> tuple[int, ...]:
        """How many of the rows before `row` each source has."""
        phase, inside, base = self._find(row)
        left, out = sum(phase), list(base)
        for s in _descending(phase):
            mine = _share(inside, phase[s], left)
            out[s] += mine
            inside, left = inside - mine, left - phase[s]
        return tuple(out)

    def _at(self, row: int) -> tuple[int, int]:
        phase, inside, base = self._find(row)
        left = sum(phase)
        for s in _descending(phase):
            mine = _share(inside, phase[s], left)
            if _share(inside + 1, phase[s], left) > mine:
                return s, base[s] + mine
            inside, left = inside - mine, left - phase[s]
        raise AssertionError("every row has a source")

    def _find(self, row: int) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        """(phase, row within it, rows per source before it)."""
        j = min(bisect_right(self._starts, row), len(self._phases)) - 1
        phase, base = self._phases[j], self._before[j]
        turns, inside = divmod(row - self._starts[j], sum(phase))
        return phase, inside, tuple(b + turns * c for b, c in zip(base, phase, strict=True))


def _descending(counts: Sequence[int]) -> list[int]:
    return sorted((s for s, c in enumerate(counts) if c), key=lambda s: (-counts[s], s))


def _share(rows: int, count: int, total: int) -> int:
    """Of the first `rows` of `total` rows, those of a source that has `count` in all."""
    return (rows * count + total // 2) // total
