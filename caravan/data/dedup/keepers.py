"""Which texts are copies of which, and which one of them stays: links, clusters, one rule for all methods.

Every text has a place (its number in the order of arrival) and a rank that depends on nothing but itself:
held-out texts before others, then longer before shorter, then the smaller hash of text, id and source. Of a
cluster (texts linked directly or through others) the best ranked one stays. Order of arrival, shards and
processes can change places, never ranks, hence never who stays.

`Keyed` finds texts that share a key (a digest, a URL, a band of a signature) with bounded memory: keys lie in
a file, and are sorted in as many ranges of their top bits as it takes. Ranks, parents and keys are columns
on disk (`caravan/data/columns.py`), so that none of this grows in memory with the number of texts.

Legend: D texts, E links."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from caravan.data.columns import Column

SORT_BYTES = 56
"""What sorting takes per key: key, place, tie break, and the orders over them."""
_CHUNK = 1 << 14


class Ranks:
    """Rank of every text, as it arrives. 17 bytes per text, in files of `folder`."""

    def __init__(self, folder: Path | None = None) -> None:
        self._hash, self._chars = Column(folder, np.uint64), Column(folder, np.int64)
        self._heldout = Column(folder, np.bool_)

    def add(
        self, hash_D: np.ndarray | Sequence[int], chars_D: np.ndarray | Sequence[int],
        heldout: np.ndarray | Sequence[bool] | bool = False,
    ) -> None:  # fmt: skip
        """Hashes of (text, id, source), lengths, and whether these texts are held out."""
        self._hash.add(np.asarray(hash_D, np.uint64))
        self._chars.add(np.asarray(chars_D, np.int64))
        self._heldout.add(np.broadcast_to(np.asarray(heldout, np.bool_), len(hash_D)))

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(hash uint64, characters int64, held out bool), one per text, all of them in memory."""
        return self._hash[:], self._chars[:], self._heldout[:]

    def __len__(self) -> int:
        return len(self._hash)

    def keys(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What places are ranked by, the last first, as `numpy.lexsort` takes it: (hash uint64, characters
        negated, in training bool)."""
        return self._hash.take(places), -self._chars.take(places), ~self._heldout.take(places)

    def rows(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `add` was given of these texts."""
        return self._hash.take(places), self._chars.take(places), self._heldout.take(places)

    def hashes(self, places: np.ndarray) -> np.ndarray:
        """uint64: the hashes of these texts."""
        return self._hash.take(places)

    def order(self, places: np.ndarray) -> np.ndarray:
        """Which of `places` comes first, second, ... by rank."""
        return np.lexsort(self.keys(places))

    def better(self, a_E: np.ndarray, b_E: np.ndarray) -> np.ndarray:
        """bool [E]: whether text a ranks before text b."""
        out = np.zeros(len(a_E), np.bool_)
        for one, other in zip(self.keys(a_E), self.keys(b_E), strict=True):
            out = (one < other) | ((one == other) & out)
        return out

    def by_hash(self, memory_bytes: int) -> Iterator[np.ndarray]:
        """int64: all places by hash, then length, then place, as many at a time as `memory_bytes` allow."""
        for low, high in _ranges(len(self), memory_bytes):
            hashes, places = _between(self._hash, low, high)
            yield places[np.lexsort((self._chars.take(places), hashes))]

    def close(self) -> None:
        """Remove the files."""
        for column in (self._hash, self._chars, self._heldout):
            column.close()


class Links:
    """Clusters that grow by links (union-find, in arrays). 8 bytes per text, in a file of `folder`."""

    def __init__(self, count: int, folder: Path | None = None) -> None:
        self._folder, self._parent = folder, Column.numbered(folder, count)

    def add(self, a_E: np.ndarray, b_E: np.ndarray) -> None:
        """Link places pairwise."""
        while len(a_E):
            a_E, b_E = self.roots(a_E), self.roots(b_E)
            differ = a_E != b_E
            a_E, b_E = a_E[differ], b_E[differ]
            # A root takes the smallest root it is linked to; what it loses by that comes in the next round.
            self._parent.least(np.maximum(a_E, b_E), np.minimum(a_E, b_E))

    def roots(self, places: np.ndarray) -> np.ndarray:
        """One place that stands for the cluster of each: its smallest."""
        found = self._parent.take(places)
        while ((above := self._parent.take(found)) != found).any():
            found = above
        self._parent.put(places, found)
        return found

    def pairs(self, ranks: Ranks) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(copies int64, who stays in place of each int64), copies ascending, some at a time."""
        best = Column.numbered(self._folder, len(self._parent))  # of a cluster, at its root
        for place, root in self._linked():
            order = np.lexsort((*ranks.keys(place), root))
            root, first = np.unique(root[order], return_index=True)
            place, there = place[order[first]], best.take(root)
            better = ranks.better(place, there)  # the same rank: the earlier stays
            best.put(root[better], place[better])
        for at in range(0, len(self._parent), _CHUNK):
            place = np.arange(at, min(at + _CHUNK, len(self._parent)))
            stays = best.take(self.roots(place))
            yield place[stays != place], stays[stays != place]
        best.close()

    def close(self) -> None:
        """Remove the file."""
        self._parent.close()

    def _linked(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(places that are not their own root, root)."""
        for at in range(0, len(self._parent), _CHUNK):
            place = np.arange(at, min(at + _CHUNK, len(self._parent)))
            root = self.roots(place)
            yield place[root != place], root[root != place]

    def clusters(self, ranks: Ranks) -> tuple[np.ndarray, np.ndarray]:
        """`pairs` at once: (copies int64, who stays in place of each int64), copies ascending."""
        none = np.zeros(0, np.int64)
        found = [(none, none), *self.pairs(ranks)]
        return np.concatenate([c for c, _ in found]), np.concatenate([s for _, s in found])


class Keyed:
    """A column of 64-bit keys on disk, one per text."""

    def __init__(self, folder: Path | None) -> None:
        self._keys = Column(folder, np.uint64)

    def add(self, key_D: np.ndarray) -> None:
        """Keys of the next texts, uint64."""
        self._keys.add(key_D)

    def take(self, places: np.ndarray) -> np.ndarray:
        """uint64: the keys of these texts."""
        return self._keys.take(places)

    def close(self) -> None:
        """Remove the file."""
        self._keys.close()

    def groups(
        self, ranks: Ranks | None, memory_bytes: int, without: Column | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(keys, places) of texts whose key another text has too: equal keys next to each other, each run by
        the texts' hashes, or by their places if there are no ranks. In ranges of keys; a range takes about
        `memory_bytes`, unless more texts share one key. Texts marked in `without` are left out."""
        for low, high in _ranges(len(self._keys), memory_bytes):
            key, place = _between(self._keys, low, high, without)
            order = np.argsort(key)
            ordered = key[order]
            same = np.zeros(len(key) + 1, np.bool_)
            np.equal(ordered[1:], ordered[:-1], out=same[1:-1])
            shared = order[same[1:] | same[:-1]]
            key, place = key[shared], place[shared]
            order = np.lexsort((place, key) if ranks is None else (place, ranks.hashes(place), key))
            yield key[order], place[order]


def _ranges(count: int, memory_bytes: int) -> Iterator[tuple[int, int]]:
    """(least, largest) 64-bit number of ranges in which so many random ones can be sorted one after
    another."""
    ranges = max(1, -(-count * SORT_BYTES // max(1, memory_bytes)))
    edges = [(1 << 64) * r // ranges for r in range(ranges + 1)]
    return ((low, high - 1) for low, high in pairwise(edges))


def _between(
    column: Column, low: int, high: int, without: Column | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of a column from `low` to `high`, their places); those marked in `without` are left out."""
    keys, places = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for at, part in column.chunks():
        chosen = (part >= np.uint64(low)) & (part <= np.uint64(high))
        if without is not None:
            chosen &= without[at : at + len(part)] == 0
        inside = np.flatnonzero(chosen)
        keys.append(part[inside])
        places.append(inside + at)
    return np.concatenate(keys), np.concatenate(places)
