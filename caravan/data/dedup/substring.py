"""Spans that stand in the corpus before: 50 tokens in a row that another text has too (Lee et al. 2022,
"Deduplicating training data makes language models better", arXiv 2107.06499).

They remove every copy, found with a suffix array. Here one copy stays: the one in the best ranked text (see
`keepers`), the earliest within it, and no suffix array is needed: a polynomial hash of every 50 tokens in a
row is sorted in partitions that fit into memory, and whatever shares a hash is compared token by token before
anything is removed. A false friend by hash cannot remove anything, and no true copy is lost to one.

The tokens of a text are its words, marks and, in scripts without spaces, characters (`units.EVERYTHING`), so
that two spans are the same if they differ in white space alone. On disk: 8 bytes per token for its hash, 8
for its place, 4 per character to compare, 16 per token while sorting.

Whole sentences may be the tokens instead (`add(cut, begins_U)`): with a span of three this is C4's rule
(Raffel et al. 2020, section 2.2: "we discarded all but one of any three-sentence span occurring more than
once in the data set").

Legend: T tokens of all texts, D texts, W windows found more than once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from caravan.data.dedup.keepers import Ranks
from caravan.data.dedup.units import Units, joined, windows

SPAN = 50
_CHUNK = 1 << 17
_SORT_BYTES = 48
_CACHED_BYTES = 1 << 26
_OPEN_FILES = 256


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop) of text `place` are a copy of tokens from `origin_start` on of text `origin`."""

    place: int
    start: int
    stop: int
    origin: int
    origin_start: int


class Spans:
    """Tokens of all texts on disk, and the spans among them that are copies."""

    def __init__(self, folder: Path, span: int = SPAN, memory_bytes: int = 1 << 30) -> None:
        self._folder, self._span, self._memory = folder, span, memory_bytes
        names = ("tokens", "starts", "codes")
        self._files = {n: open(folder / f"span.{n}", "wb") for n in names}  # noqa: SIM115  (closed by close())
        self._ends: list[np.ndarray] = []
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
        for name, column in (("tokens", hashes), ("starts", starts), ("codes", codes.astype(np.uint32))):
            self._files[name].write(column.tobytes())
        self._ends.append(ends + self.tokens)
        self.tokens += len(hashes)
        self._chars += int(size.sum())

    def found(self, ranks: Ranks) -> list[Span]:
        """All spans that are copies, by text and place. Spans of a text do not overlap."""
        self._files["starts"].write(np.int64(self._chars).tobytes())
        for file in self._files.values():
            file.flush()
        if self.tokens < self._span:
            return []
        search = _Search(
            self._folder / "span.tokens",
            np.memmap(self._folder / "span.tokens", np.uint64, "r"),
            np.memmap(self._folder / "span.starts", np.int64, "r"),
            np.memmap(self._folder / "span.codes", np.uint32, "r"),
            np.concatenate(self._ends),
            ranks.position(),
            self._span,
        )
        small = min(self._memory, _CACHED_BYTES)  # sorting is faster in parts, too
        parts = max(1, -(-self.tokens * _SORT_BYTES // max(1, small)))
        pairs = [search.copies(hashes, places) for hashes, places in self._parted(search, parts)]
        copy, kept = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
        order = np.argsort(copy)
        return search.spans(copy[order], kept[order])

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
        for name, file in self._files.items():
            file.close()
            (self._folder / f"span.{name}").unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Search:
    path: Path
    tokens_T: np.ndarray
    """uint64, a memory map of `path`, for the few places that are looked at."""
    starts_T: np.ndarray
    """int64 [T + 1]: where each token begins among the characters, white space left out."""
    codes: np.ndarray
    ends_D: np.ndarray
    """int64: one past the last token of each text."""
    rank_D: np.ndarray
    """int64: 0 is the text that keeps what it shares with any other."""
    span: int

    def windows(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(hashes uint64, places int64) of every `span` tokens in a row of one text."""
        for at in range(0, len(self.tokens_T), _CHUNK):
            # Read, not mapped: mapped pages count as memory of this process.
            tokens = np.fromfile(self.path, np.uint64, _CHUNK + self.span - 1, offset=8 * at)
            hashes = windows(tokens, self.span)
            first, last = np.searchsorted(self.ends_D, (at, at + _CHUNK + self.span), side="right")
            ends = self.ends_D[first:last]  # texts that end within reach
            begins = (
                np.concatenate([self.ends_D[max(0, first - 1) : first], ends[:-1]]) if len(ends) else ends
            )
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
        rank = self.rank_D[np.searchsorted(self.ends_D, places, side="right")]
        order = np.lexsort((places, rank, hashes))
        hashes, places = hashes[order], places[order]
        new = np.ones(len(order), np.bool_)
        np.not_equal(hashes[1:], hashes[:-1], out=new[1:])
        first = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
        later = np.flatnonzero(~new)
        equal = self._equal(places[later], places[first[later]])
        if equal.all():
            return places[later], places[first[later]]
        mixed = np.unique(first[later[~equal]])  # windows that share a hash and are not the same
        fine = later[~np.isin(first[later], mixed)]
        found = [(places[fine], places[first[fine]])]
        for group in mixed:
            members = places[first == group]
            rows = self.tokens_T[members[:, None] + np.arange(self.span)]
            _, best, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
            stays = members[best[which.ravel()]]
            found.append((members[members != stays], stays[members != stays]))
        return np.concatenate([c for c, _ in found]), np.concatenate([k for _, k in found])

    def _equal(self, a_W: np.ndarray, b_W: np.ndarray, chunk: int = 1 << 14) -> np.ndarray:
        """bool: windows whose tokens are equal pairwise."""
        out = np.ones(len(a_W), np.bool_)
        steps = np.arange(self.span)
        for at in range(0, len(a_W), chunk):
            a, b = a_W[at : at + chunk, None] + steps, b_W[at : at + chunk, None] + steps
            out[at : at + chunk] = (self.tokens_T[a] == self.tokens_T[b]).all(axis=1)
        return out

    def spans(self, copy_W: np.ndarray, kept_W: np.ndarray) -> list[Span]:
        """Windows, ascending, joined to spans; character by character the same as what they are copies of."""
        out: list[Span] = []
        if not len(copy_W):
            return out
        breaks = np.flatnonzero((np.diff(copy_W) != 1) | (np.diff(kept_W) != 1)) + 1
        edges = np.concatenate([[0], breaks, [len(copy_W)]])
        for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            copy, kept, count = int(copy_W[a]), int(kept_W[a]), b - a
            if self._same(copy, kept, count + self.span - 1):
                self._note(out, copy, kept, count)
                continue
            for k in range(count):
                if self._same(copy + k, kept + k, self.span):
                    self._note(out, copy + k, kept + k, 1)
        return _disjoint(out)

    def _same(self, a: int, b: int, count: int) -> bool:
        starts, codes = self.starts_T, self.codes
        rows_a, rows_b = starts[a : a + count + 1], starts[b : b + count + 1]
        return bool(
            np.array_equal(rows_a - rows_a[0], rows_b - rows_b[0])
            and np.array_equal(codes[rows_a[0] : rows_a[-1]], codes[rows_b[0] : rows_b[-1]])
        )

    def _note(self, out: list[Span], copy: int, kept: int, count: int) -> None:
        place, origin = (int(p) for p in np.searchsorted(self.ends_D, (copy, kept), side="right"))
        begin = int(self.ends_D[place - 1]) if place else 0
        begin_origin = int(self.ends_D[origin - 1]) if origin else 0
        start, stop = copy - begin, copy - begin + count + self.span - 1
        # A refrain overlaps itself: what the first copy is made of stays.
        low = max(start, kept - begin + self.span) if place == origin else start
        if low < stop:
            out.append(Span(place, low, stop, origin, kept - begin_origin + low - start))


def _disjoint(spans: list[Span]) -> list[Span]:
    """The same tokens by text and place, each in one span."""
    out: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.place, s.start, s.stop)):
        behind = out[-1].stop - span.start if out and out[-1].place == span.place else 0
        if behind > 0:
            if span.start + behind >= span.stop:
                continue
            span = replace(span, start=span.start + behind, origin_start=span.origin_start + behind)
        out.append(span)
    return out


def without(text: str, cuts: Sequence[tuple[int, int]]) -> str:
    """The text without characters [start, stop) of every cut; cuts may overlap."""
    kept, at = [], 0
    for start, stop in sorted(cuts):
        kept.append(text[at : max(at, start)])
        at = max(at, stop)
    kept.append(text[at:])
    return "".join(kept).strip()
