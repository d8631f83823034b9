"""Texts that are the same: equal digests of the text, or of the address it came from (`url`).

128 bits of blake2b of the text with runs of white space made one space. Two different texts share a digest
with a probability below 1e-19 even among ten billion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from caravan.data.columns import Column
from caravan.data.dedup.keepers import Keyed, Links, Ranks
from caravan.data.dedup.units import digest


def text_key(text: str) -> str:
    """What must be equal: the text, whatever its white space."""
    return " ".join(text.split())


class SameKey:
    """Texts with one key are one cluster. Texts whose key is empty are left alone."""

    def __init__(self, folder: Path | None, memory_bytes: int) -> None:
        self._folder, self._low, self._high = folder, Keyed(folder), Keyed(folder)
        self._memory = memory_bytes
        self._count = 0

    def add(self, keys: Sequence[str]) -> None:
        """Keys of the next texts."""
        # A text without key gets one that nobody else has.
        self.add_digests([digest(k) if k else digest("", str(self._count + d)) for d, k in enumerate(keys)])

    def add_digests(self, pairs: Sequence[tuple[int, int]]) -> None:
        """The keys' 128 bits, as two numbers each."""
        self._count += len(pairs)
        self._low.add(np.array([p[0] for p in pairs], np.uint64))
        self._high.add(np.array([p[1] for p in pairs], np.uint64))

    def link(self, ranks: Ranks, links: Links) -> int:
        """Link what is equal; how many texts have a key that came before."""
        copies = 0
        for place, same in self.runs(ranks):
            links.add(place[1:][same], place[:-1][same])
            copies += int(same.sum())
        self.close()
        return copies

    def repeated(self) -> Column:
        """uint8 [D]: 1 for every text whose key came before."""
        out = Column.filled(self._folder, np.uint8, self._count)
        for place, same in self.runs():
            out.put(place[1:][same], 1)
        self.close()
        return out

    def runs(self, ranks: Ranks | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(places, whether each but the first has the key of the one before it) of texts that may have a key
        in common, some at a time; of one key by rank, or by place if there are no ranks."""
        for key, place in self._low.groups(ranks, self._memory):
            high = self._high.take(place)
            order = np.lexsort((high, key))  # stable: 128 bits must agree
            key, high, place = key[order], high[order], place[order]
            yield place, (key[1:] == key[:-1]) & (high[1:] == high[:-1])

    def close(self) -> None:
        """Remove the files."""
        self._low.close()
        self._high.close()
