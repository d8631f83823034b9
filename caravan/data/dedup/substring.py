"""Spans that stand in the corpus before: 50 tokens in a row that another text has too (Lee et al. 2022,
"Deduplicating training data makes language models better", arXiv 2107.06499).

They remove every copy, found with a suffix array. Here one copy stays: the one in the best ranked text (see
`keepers`), the earliest within it, and no suffix array is needed: a polynomial hash of every 50 tokens in a
row is sorted in partitions that fit into memory, and whatever shares a hash is compared token by token before
anything is removed. A false friend by hash cannot remove anything, and no true copy is lost to one.

The tokens of a text are its words, marks and, in scripts without spaces, characters (`units.EVERYTHING`), so
that two spans are the same if they differ in white space alone. On disk: 8 bytes per token for its hash, 8
for its place, 4 per character to compare, 16 per token while sorting, 16 per window that is a copy. Nothing
in memory grows with the texts or with the copies found.

Whole sentences may be the tokens instead (`add(cut, begins_U)`): with a span of three this is C4's rule
(Raffel et al. 2020, section 2.2: "we discarded all but one of any three-sentence span occurring more than
once in the data set").

Legend: T tokens of all texts, D texts, W windows found more than once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from caravan.data.columns import Column
from caravan.data.dedup.keepers import Ranks
from caravan.data.dedup.units import Units, joined, windows

SPAN = 50
_CHUNK = 1 << 17
_SORT_BYTES = 48
_CACHED_BYTES = 1 << 26
_OPEN_FILES = 256
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop) of text `place` are a copy of tokens from `origin_start` on of text `origin`.

    Where a text repeats itself ("la la la ...") each round is a copy of the one before it."""

    place: int
    start: int
    stop: int
    origin: int
    origin_start: int


class Spans:
    """Tokens of all texts on disk, and the spans among them that are copies."""

    def __init__(self, folder: Path, span: int = SPAN, memory_bytes: int = 1 << 30) -> None:
        self._folder, self._span, self._memory = folder, span, memory_bytes
        self._tokens, self._starts = Column(folder, np.uint64), Column(folder, np.int64)
        self._codes, self._ends = Column(folder, np.uint32), Column(folder, np.int64)
        self.tokens = self._chars = 0

    def add(self, cut: Units, begins_U: np.ndarray | None = None) -> None:
        """The next texts, cut by EVERYTHING. With `begins_U` (bool, from `sentences`) the units from one
        beginning to the next are one token."""
        size = cut.end_U - cut.start_U
        edge = np.zeros(len(cut.codes_N) + 1, np.int8)
        edge[cut.start_U] += 1
        edge[cut.end_U] -= 1
        codes = cut.codes_N[np.cumsum(edge[:-1], dtype=np.int8) > 0]
        starts = self._chars + np.cumsum(size) - size
        hashes, ends = cut.hash_U, cut.range_D[1:]
        if begins_U is not None:
            first = np.flatnonzero(begins_U)
            hashes, starts, ends = joined(hashes, first), starts[first], np.searchsorted(first, ends)
        self._tokens.add(hashes)
        self._starts.add(starts)
        self._codes.add(codes.astype(np.uint32))
        self._ends.add(ends + self.tokens)
        self.tokens += len(hashes)
        self._chars += int(size.sum())

    def found(self, ranks: Ranks) -> list[Span]:
        """`spans` at once."""
        return list(self.spans(ranks))

    def spans(self, ranks: Ranks) -> Iterator[Span]:
        """All spans that are copies, by text and place. Spans of a text do not overlap."""
        if self.tokens < self._span:
            return
        self._starts.add([self._chars])
        search = _Search(self._tokens, self._starts, self._codes, self._ends, ranks, self._span)
        small = min(self._memory, _CACHED_BYTES)  # sorting is faster in parts, too
        parts = max(1, -(-self.tokens * _SORT_BYTES // max(1, small)))
        copy, kept = Column(self._folder, np.int64), Column(self._folder, np.int64)
        for hashes, places in self._parted(search, parts):
            for column, found in zip((copy, kept), search.copies(hashes, places), strict=True):
                column.add(found)
        yield from search.spans(self._ascending(copy, kept))
        copy.close()
        kept.close()

    def _ascending(self, copy: Column, kept: Column) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(windows that are copies, the window that stays for each), in ranges of places."""
        ranges = max(1, -(-len(copy) * _SORT_BYTES // max(1, self._memory)))
        edges = [self.tokens * r // ranges for r in range(ranges + 1)]
        for low, high in pairwise(edges):
            rows = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
            for at, part in copy.chunks():
                inside = np.flatnonzero((part >= low) & (part < high))
                rows.append((part[inside], kept.take(inside + at)))
            copies, stays = (np.concatenate([row[side] for row in rows]) for side in (0, 1))
            order = np.argsort(copies)
            yield copies[order], stays[order]

    def _parted(self, search: _Search, parts: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(hashes, places) of all windows, those with equal hashes together, in parts that fit into
        memory."""
        if parts == 1:
            pairs = list(search.windows())
            yield np.concatenate([h for h, _ in pairs]), np.concatenate([w for _, w in pairs])
            return
        for first in range(0, parts, _OPEN_FILES):
            yield from self._spilled(search, parts, first, min(parts, first + _OPEN_FILES))

    def _spilled(
        self, search: _Search, parts: int, first: int, last: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        names = [self._folder / f"span.part{k}" for k in range(first, last)]
        files = [open(name, "wb") for name in names]  # noqa: SIM115  (closed below)
        for hashes, places in search.windows():
            which = (hashes >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32)
            order = np.argsort(which, kind="stable")
            edges = np.searchsorted(which[order], np.arange(first, last + 1))
            rows = np.stack([hashes[order], places[order].astype(np.uint64)], axis=1)
            for k, file in enumerate(files):
                file.write(rows[edges[k] : edges[k + 1]].tobytes())
        for name, file in zip(names, files, strict=True):
            file.close()
            rows = np.fromfile(name, np.uint64).reshape(-1, 2)
            name.unlink()
            yield rows[:, 0].copy(), rows[:, 1].astype(np.int64)

    def close(self) -> None:
        """Remove the files."""
        for column in (self._tokens, self._starts, self._codes, self._ends):
            column.close()


@dataclass(frozen=True, slots=True)
class _Search:
    tokens: Column
    """uint64 [T]: hash of each token."""
    starts: Column
    """int64 [T + 1]: where each token begins among the characters, white space left out."""
    codes: Column
    """uint32: the characters."""
    ends: Column
    """int64 [D]: one past the last token of each text."""
    ranks: Ranks
    """Of the texts: the best keeps what it shares with any other."""
    span: int

    def windows(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(hashes uint64, places int64) of every `span` tokens in a row of one text."""
        for at in range(0, len(self.tokens), _CHUNK):
            hashes = windows(self.tokens[at : at + _CHUNK + self.span - 1], self.span)
            first, last = self.ends.search(np.array([at, at + _CHUNK + self.span])).tolist()
            ends = self.ends[first:last]  # texts that end within reach
            begins = np.concatenate([self.ends[max(0, first - 1) : first], ends[:-1]]) if len(ends) else ends
            begins = np.concatenate([np.zeros(len(ends) - len(begins), np.int64), begins])
            edge = np.zeros(len(hashes) + 1, np.int64)
            low = np.clip(np.maximum(begins, ends - self.span + 1) - at, 0, len(hashes))
            np.add.at(edge, low, 1)
            np.add.at(edge, np.clip(ends - at, 0, len(hashes)), -1)
            inside = np.flatnonzero(np.cumsum(edge[:-1]) == 0)
            yield hashes[inside], inside + at

    def copies(self, hashes: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(windows that are copies, the window that stays for each), equal token by token."""
        order = np.argsort(hashes)
        ordered = hashes[order]
        same = np.zeros(len(order) + 1, np.bool_)
        np.equal(ordered[1:], ordered[:-1], out=same[1:-1])
        shared = order[same[1:] | same[:-1]]
        hashes, places = hashes[shared], places[shared]
        texts = self.ends.search(places)
        order = np.lexsort((places, *self.ranks.keys(texts), hashes))
        hashes, places, texts = hashes[order], places[order], texts[order]
        new = np.ones(len(order), np.bool_)
        np.not_equal(hashes[1:], hashes[:-1], out=new[1:])
        first = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
        later = np.flatnonzero(~new)
        equal = self._equal(places[later], places[first[later]])
        # "la la la ...": its windows are copies of one another. Seen as copies of the one that they overlap
        # they follow each other on both sides, and make one span.
        overlaps = (texts[later] == texts[later - 1]) & (places[later] - places[later - 1] < self.span)
        stays = np.where(overlaps, places[later - 1], places[first[later]])
        if equal.all():
            return places[later], stays
        mixed = np.unique(first[later[~equal]])  # windows that share a hash and are not the same
        fine = ~np.isin(first[later], mixed)
        found = [(places[later][fine], stays[fine])]
        for group in mixed:
            members = places[first == group]
            rows = self.tokens.runs(members, self.span)
            _, best, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
            stays = members[best[which.ravel()]]
            found.append((members[members != stays], stays[members != stays]))
        return np.concatenate([c for c, _ in found]), np.concatenate([k for _, k in found])

    def _equal(self, a_W: np.ndarray, b_W: np.ndarray, chunk: int = 1 << 14) -> np.ndarray:
        """bool: windows whose tokens are equal pairwise."""
        out = np.ones(len(a_W), np.bool_)
        for at in range(0, len(a_W), chunk):
            part = slice(at, at + chunk)
            rows = (self.tokens.runs(places[part], self.span) for places in (a_W, b_W))
            out[part] = np.equal(*rows).all(axis=1)
        return out

    def spans(self, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[Span]:
        """Windows, ascending, joined to spans; character by character the same as what they are copies of."""
        waiting: list[Span] = []  # of one text
        for copy, kept, count in _runs(pairs):
            if self._same(copy, kept, count + self.span - 1):
                found = [self._found(copy, kept, count)]
            else:
                alike = (k for k in range(count) if self._same(copy + k, kept + k, self.span))
                found = [self._found(copy + k, kept + k, 1) for k in alike]
            for span in found:
                if waiting and waiting[-1].place != span.place:
                    yield from _disjoint(waiting)
                    waiting = []
                waiting.append(span)
        yield from _disjoint(waiting)

    def _same(self, a: int, b: int, count: int) -> bool:
        starts, codes = self.starts, self.codes
        rows_a, rows_b = starts[a : a + count + 1], starts[b : b + count + 1]
        return bool(
            np.array_equal(rows_a - rows_a[0], rows_b - rows_b[0])
            and np.array_equal(codes[rows_a[0] : rows_a[-1]], codes[rows_b[0] : rows_b[-1]])
        )

    def _found(self, copy: int, kept: int, count: int) -> Span:
        place, origin = self.ends.search(np.array([copy, kept])).tolist()
        begin, begin_origin = (int(self.ends[p - 1 : p][0]) if p else 0 for p in (place, origin))
        start, stop = copy - begin, copy - begin + count + self.span - 1
        # A refrain overlaps itself: what the first copy is made of stays.
        low = max(start, kept - begin + self.span) if place == origin else start
        return Span(place, low, stop, origin, kept - begin_origin + low - start)


def _runs(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[int, int, int]]:
    """(copy, kept, windows) of windows that follow each other on both sides."""
    held: tuple[int, int, int] | None = None
    for copy_W, kept_W in pairs:
        breaks = np.flatnonzero((np.diff(copy_W) != 1) | (np.diff(kept_W) != 1)) + 1
        edges = [0, *breaks.tolist(), len(copy_W)] if len(copy_W) else []
        for a, b in pairwise(edges):
            copy, kept = int(copy_W[a]), int(kept_W[a])
            if held and (copy, kept) == (held[0] + held[2], held[1] + held[2]):  # cut by a range's edge
                held = *held[:2], held[2] + b - a
                continue
            if held:
                yield held
            held = copy, kept, b - a
    if held:
        yield held


def _disjoint(spans: list[Span]) -> list[Span]:
    """The same tokens by text and place, each in one span; one of no tokens is gone."""
    out: list[Span] = []
    for span in sorted((s for s in spans if s.start < s.stop), key=lambda s: (s.place, s.start, s.stop)):
        behind = out[-1].stop - span.start if out and out[-1].place == span.place else 0
        if behind > 0:
            if span.start + behind >= span.stop:
                continue
            span = replace(span, start=span.start + behind, origin_start=span.origin_start + behind)
        out.append(span)
    return out


def without(text: str, cuts: Sequence[tuple[int, int]]) -> str:
    """The text without characters [start, stop) of every cut; cuts may overlap. White space behind goes too,
    unless it is all that parts what came before from what comes."""
    kept, at = [], 0
    for start, stop in _merged(cuts):
        kept.append(text[at:start])
        at = stop
        if not text[start - 1 : start].strip():
            space = _SPACE.match(text, stop)
            at = space.end() if space else stop
    kept.append(text[at:])
    return "".join(kept).strip()


def _merged(cuts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, stop in sorted(cuts):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], stop)
        else:
            out.append((start, stop))
    return out
