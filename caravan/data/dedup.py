"""Exact and near duplicates: MinHash over 5-grams, 14 bands of 8 (Broder 1997; the setting of FineWeb).

Two texts that share 80 % of their 5-grams meet in a band with probability 92 %, at 50 % with 5 %; those that
meet are compared by their whole signatures (standard error 0.04) before one is dropped. Words are the units,
characters in scripts written without spaces. Numbers are kept as they are: two tables of sums are not the
same text.

Legend: K hash functions (112).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from caravan.data.clean import fold
from caravan.data.permute import mix

BANDS, ROWS, GRAM = 14, 8, 5
_K = BANDS * ROWS
_A_K = np.array([mix(1, k) | 1 for k in range(_K)], np.uint64)
_B_K = np.array([mix(2, k) for k in range(_K)], np.uint64)
_CHUNK = 4096


class WordHashes:
    """64-bit hashes of words, the same in every process (Python's own are not)."""

    def __init__(self, most: int = 1 << 20) -> None:
        self._known: dict[str, int] = {}
        self._most = most

    def __call__(self, words: Sequence[str]) -> np.ndarray:
        """uint64, one per word."""
        known = self._known
        if len(known) > self._most:
            known.clear()
        for word in set(words).difference(known):
            known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return np.fromiter(map(known.__getitem__, words), np.uint64, len(words))


def char_hashes(text: str) -> np.ndarray:
    """uint64, one per character that is a letter or a digit."""
    codes = np.frombuffer("".join(filter(str.isalnum, text)).encode("utf-32-le", "replace"), np.uint32)
    return fold(codes.astype(np.uint64), np.full(1, 0xA5A5A5A5A5A5A5A5, np.uint64))


def signature(units_n: np.ndarray) -> np.ndarray:
    """uint32 [K] MinHash signature of a text given as unit hashes; a text shorter than a 5-gram is one
    shingle."""
    grams = units_n[: max(1, len(units_n) - GRAM + 1)]
    for shift in range(1, min(GRAM, len(units_n))):
        grams = fold(grams, units_n[shift : shift + len(grams)])
    grams = np.unique(grams) if len(grams) else np.zeros(1, np.uint64)
    low = np.full(_K, 0xFFFFFFFF, np.uint32)
    with np.errstate(over="ignore"):
        for start in range(0, len(grams), _CHUNK):
            hashed = _A_K[:, None] * grams[None, start : start + _CHUNK] + _B_K[:, None]
            low = np.minimum(low, (hashed >> np.uint64(32)).min(axis=1).astype(np.uint32))
    return low


def near_duplicates(signatures: Sequence[np.ndarray], similarity: float) -> dict[int, int]:
    """Index of a text to drop -> index of the earlier one it resembles. The first of every cluster stays."""
    if len(signatures) < 2:
        return {}
    table = np.stack(signatures)
    parent = np.arange(len(table))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    for band in range(BANDS):
        rows = table[:, band * ROWS : (band + 1) * ROWS].astype(np.uint64)
        key = rows[:, 0]
        for column in range(1, ROWS):
            key = fold(key, rows[:, column])
        order = np.argsort(key, kind="stable")
        same = np.flatnonzero(key[order[1:]] == key[order[:-1]])
        first = -1
        for at in same:  # neighbours with one hash: compare each with the first of its run
            i, j = int(order[at]), int(order[at + 1])
            first = i if first < 0 or key[first] != key[i] else first
            if np.count_nonzero(table[first] == table[j]) >= similarity * _K:
                a, b = root(first), root(j)
                parent[max(a, b)] = min(a, b)
    return {i: root(i) for i in range(len(table)) if root(i) != i}
