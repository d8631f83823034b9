"""Which texts are copies of which, and which one of them stays: links, clusters, one rule for all methods.

Every text has a place (its number in the order of arrival) and a rank that depends on nothing but itself:
held-out texts before others, then longer before shorter, then the smaller hash of text, id and source. Of a
cluster (texts linked directly or through others) the best ranked one stays. Order of arrival, shards and
processes can change places, never ranks, hence never who stays.

`Keyed` finds texts that share a key (a digest, a URL, a band of a signature) with bounded memory: keys lie in
a file, and are sorted in as many ranges of their top bits as it takes.

Legend: D texts, E links."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

SORT_BYTES = 56
"""What sorting takes per key: key, place, tie break, and the orders over them."""


@dataclass(slots=True)
class Ranks:
    """Rank of every text, as it arrives. 17 bytes per text in memory."""

    _hash: list[np.ndarray] = field(default_factory=list)
    _chars: list[np.ndarray] = field(default_factory=list)
    _heldout: list[np.ndarray] = field(default_factory=list)

    def add(
        self, hash_D: np.ndarray | Sequence[int], chars_D: np.ndarray | Sequence[int],
        heldout: np.ndarray | Sequence[bool] | bool = False,
    ) -> None:  # fmt: skip
        """Hashes of (text, id, source), lengths, and whether these texts are held out."""
        self._hash.append(np.asarray(hash_D, np.uint64))
        self._chars.append(np.asarray(chars_D, np.int64))
        self._heldout.append(np.broadcast_to(np.asarray(heldout, np.bool_), len(hash_D)).copy())

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(hash uint64, characters int64, held out bool), one per text."""
        for parts in (self._hash, self._chars, self._heldout):
            if len(parts) != 1:
                empty = np.zeros(0, np.uint64 if parts is self._hash else np.int64)
                parts[:] = [np.concatenate(parts) if parts else empty]
        return self._hash[0], self._chars[0], self._heldout[0].astype(np.bool_)

    def __len__(self) -> int:
        return len(self.columns()[0])

    def order(self, places: np.ndarray) -> np.ndarray:
        """Which of `places` comes first, second, ... by rank."""
        hashes, chars, heldout = self.columns()
        return np.lexsort((hashes[places], -chars[places], ~heldout[places]))

    def position(self) -> np.ndarray:
        """int64 [D]: 0 for the best ranked text, and so on."""
        out = np.empty(len(self), np.int64)
        out[self.order(np.arange(len(self)))] = np.arange(len(self))
        return out


class Links:
    """Clusters that grow by links (union-find, in arrays). 8 bytes per text."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count)

    def add(self, a_E: np.ndarray, b_E: np.ndarray) -> None:
        """Link places pairwise."""
        parent = self._parent
        while len(a_E):
            a_E, b_E = self.roots(a_E), self.roots(b_E)
            differ = a_E != b_E
            a_E, b_E = a_E[differ], b_E[differ]
            # A root takes the smallest root it is linked to; what it loses by that comes in the next round.
            np.minimum.at(parent, np.maximum(a_E, b_E), np.minimum(a_E, b_E))

    def roots(self, places: np.ndarray) -> np.ndarray:
        """One place that stands for the cluster of each."""
        found = self._parent[places]
        while ((above := self._parent[found]) != found).any():
            found = above
        self._parent[places] = found
        return found

    def clusters(self, ranks: Ranks) -> tuple[np.ndarray, np.ndarray]:
        """(copies int64, who stays in place of each int64), copies ascending."""
        roots = self.roots(np.arange(len(self._parent)))
        size = np.bincount(roots, minlength=len(roots))
        places = np.flatnonzero(size[roots] > 1)
        if not len(places):
            return places, places
        order = ranks.order(places)
        ranked = places[order]
        _, first, which = np.unique(roots[ranked], return_index=True, return_inverse=True)
        stays = ranked[first[which]]
        copies = ranked != stays
        ranked, stays = ranked[copies], stays[copies]
        ascending = np.argsort(ranked)
        return ranked[ascending], stays[ascending]


class Keyed:
    """A column of 64-bit keys on disk, one per text."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "wb")  # noqa: SIM115  (closed by groups())
        self._count = 0

    def add(self, key_D: np.ndarray) -> None:
        """Keys of the next texts, uint64."""
        self._file.write(np.ascontiguousarray(key_D, np.uint64).tobytes())
        self._count += len(key_D)

    def column(self) -> np.ndarray:
        """uint64 [D]: the keys, read from disk as they are looked at."""
        self._file.flush()
        return np.memmap(self.path, np.uint64, "r") if self._count else np.zeros(0, np.uint64)

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def groups(self, ranks: Ranks, memory_bytes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(keys, places) of texts whose key another text has too: equal keys next to each other, each run by
        the texts' hashes. In ranges of keys; a range takes about `memory_bytes`."""
        self._file.flush()
        hashes = ranks.columns()[0]
        ranges = max(1, -(-self._count * SORT_BYTES // max(1, memory_bytes)))
        edges = [(1 << 64) * r // ranges for r in range(ranges + 1)]
        for low, high in pairwise(edges):
            key, place = self._between(low, high - 1)
            order = np.argsort(key)
            ordered = key[order]
            same = np.zeros(len(key) + 1, np.bool_)
            np.equal(ordered[1:], ordered[:-1], out=same[1:-1])
            shared = order[same[1:] | same[:-1]]
            key, place = key[shared], place[shared]
            order = np.lexsort((hashes[place], key))
            yield key[order], place[order]

    def _between(self, low: int, high: int, chunk: int = 1 << 20) -> tuple[np.ndarray, np.ndarray]:
        keys, places = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        with open(self.path, "rb") as file:
            at = 0
            while len(part := np.frombuffer(file.read(8 * chunk), np.uint64)):
                inside = np.flatnonzero((part >= np.uint64(low)) & (part <= np.uint64(high)))
                keys.append(part[inside])
                places.append(inside + at)
                at += len(part)
        return np.concatenate(keys), np.concatenate(places)
