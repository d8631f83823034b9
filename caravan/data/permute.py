"""A random order of n things without a list of n numbers: a Feistel cipher walked until it lands inside [0,
n).

`feistel(i, n, seed)` is a bijection on [0, n). Position 5,000,000,000 of an epoch costs what position 0
costs, which makes resuming O(1) and independent of the number of ranks (the idea is grain's `index_shuffle`;
Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, for the walk).
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 4
_U64 = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """One 64-bit number of several: seeds that do not resemble each other."""
    h = 0x9E3779B97F4A7C15
    for n in numbers:
        h = ((h ^ (n & _U64)) * 0xFF51AFD7ED558CCD) & _U64
        h ^= h >> 33
        h = (h * 0xC4CEB9FE1A85EC53) & _U64
        h ^= h >> 29
    return h


def feistel(index: np.ndarray | int, n: int, seed: int) -> np.ndarray:
    """Image of each index (int64, all in [0, n)) under the permutation of [0, n) that `seed` names."""
    x = np.atleast_1d(np.asarray(index, dtype=np.uint64))
    assert n > 0 and (x.size == 0 or int(x.max()) < n), "indices must lie in [0, n)"
    half = max(1, -(-((n - 1).bit_length()) // 2))
    out = _cipher(x, half, seed)
    outside = np.flatnonzero(out >= n)
    while outside.size:  # the domain is at most 4n, so this walks a few steps
        out[outside] = _cipher(out[outside], half, seed)
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


def _cipher(x: np.ndarray, half: int, seed: int) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    a, b = x >> shift, x & mask
    for r in range(_ROUNDS):
        key = np.uint64((seed * 0x9E3779B97F4A7C15 + r * 0xD1B54A32D192ED03) & _U64)
        a, b = b, (a ^ _scramble(b + key)) & mask
    return (a << shift) | b


def _scramble(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x * np.uint64(0xFF51AFD7ED558CCD)
        x ^= x >> np.uint64(33)
        x = x * np.uint64(0xC4CEB9FE1A85EC53)
        x ^= x >> np.uint64(29)
    return x
