"""Texts that are the same: equal digests of the text, or of the address it came from (`url`).

128 bits of blake2b of the text with runs of white space made one space. Two different texts share a digest
with a probability below 1e-19 even among ten billion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from caravan.data.dedup.keepers import Keyed, Links, Ranks
from caravan.data.dedup.units import digest


def text_key(text: str) -> str:
    """What must be equal: the text, whatever its white space."""
    return " ".join(text.split())


class SameKey:
    """Texts with one key are one cluster. Texts whose key is empty are left alone."""

    def __init__(self, folder: Path, name: str, memory_bytes: int) -> None:
        self._low, self._high = Keyed(folder / f"{name}.low"), Keyed(folder / f"{name}.high")
        self._memory = memory_bytes
        self._count = 0

    def add(self, keys: Sequence[str]) -> None:
        """Keys of the next texts."""
        # A text without key gets one that nobody else has.
        pairs = [digest(k) if k else digest("", str(self._count + d)) for d, k in enumerate(keys)]
        self._count += len(keys)
        self._low.add(np.array([p[0] for p in pairs], np.uint64))
        self._high.add(np.array([p[1] for p in pairs], np.uint64))

    def link(self, ranks: Ranks, links: Links) -> int:
        """Link what is equal; how many texts have a key that came before."""
        high = self._high.column()
        copies = 0
        for key, place in self._low.groups(ranks, self._memory):
            order = np.lexsort((high[place], key))  # stable: 128 bits must agree
            key, place = key[order], place[order]
            same = (key[1:] == key[:-1]) & (high[place[1:]] == high[place[:-1]])
            links.add(place[1:][same], place[:-1][same])
            copies += int(same.sum())
        self._low.close()
        self._high.close()
        return copies
