"""Texts cut into units, and a 64-bit hash of each: what shingles, spans and benchmark n-grams are made of.

A batch of texts lies end to end in one array of code points; a table says of every code point whether it
joins its neighbours into a run (a word, a number), stands alone (a Han character, a kana, a Thai letter:
scripts written without spaces) or parts units. A run's hash is a difference of prefix sums of mixed code
points times powers of an odd number, moved back to exponent 0, so that neither the batch nor the place in it
matters and a batch costs a dozen numpy passes, whatever the number of texts.

Legend: D texts, N characters (one newline after each text), U units."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

PART, RUN, ALONE, NUMBER = 0, 1, 2, 3
_TOP = 0x33480
"""Code points from here on have no properties we look at (tags, private use)."""
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003347f"
)
"""Inside a set of characters of a pattern: letters of scripts written without spaces."""
_HAN = "\u3400-\u9fff"
_BASE = 0xD1342543DE82EF95


@dataclass(frozen=True, slots=True)
class Cut:
    """Which characters make units, as patterns of one character."""

    run: str
    """Joined with its neighbours."""
    single: str
    """Those of them that stand alone after all."""
    other: str = ""
    """Stand alone though they join nothing; all else parts units."""
    number: str = ""
    """Joined among themselves only."""
    accents: bool = True
    """Combining marks belong to what they follow."""
    lower: bool = True
    joins: bool = False
    """What stands alone joins its equals next to it: a rule of dashes is one unit."""


WORDS = Cut(r"\w", f"[{UNSPACED}]")
"""Lower-cased runs of letters, digits and _; characters of unspaced scripts."""
EVERYTHING = Cut(r"\w", f"[{UNSPACED}]", other=r"[^\w\s]", lower=False, joins=True)
"""As WORDS, case kept, and every mark or symbol: units that miss nothing but white space."""
BENCHMARK = Cut(r"[^\W\d]", f"[{_HAN}]", other="[+*/=<>%-]", number=r"\d", accents=False)
"""Words, numbers, Han characters and operators: what a benchmark's questions are compared by."""


@lru_cache(maxsize=4)
def tables(cut: Cut) -> tuple[np.ndarray, np.ndarray]:
    """(kind uint8, hash uint64 of the lower-cased character) by code point; the last entry is for all
    others."""
    everything = "".join(map(chr, range(_TOP)))

    def places(pattern: str) -> np.ndarray:
        return np.array([m.start() for m in re.finditer(pattern, everything)] if pattern else [], np.int64)

    kinds = np.zeros(_TOP + 1, np.uint8)
    kinds[places(cut.run)] = RUN
    if cut.accents:
        kinds[[c for c in range(_TOP) if unicodedata.category(everything[c])[0] == "M"]] = RUN
    kinds[places(cut.number)] = NUMBER
    single = places(cut.single)
    kinds[single[kinds[single] != PART]] = ALONE
    other = places(cut.other)
    kinds[other[kinds[other] == PART]] = ALONE
    kinds[_TOP] = ALONE if cut.other == r"[^\w\s]" else PART
    lower = np.arange(_TOP + 1, dtype=np.uint64)
    if cut.lower:
        lower[:_TOP] = [ord(low) if len(low := char.lower()) == 1 else ord(char) for char in everything]
    return kinds, mixed(lower)


def mixed(x: np.ndarray) -> np.ndarray:
    """uint64: numbers well mixed."""
    with np.errstate(over="ignore"):
        y = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        y = (y ^ (y >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return y ^ (y >> np.uint64(32))


_POWERS: list[np.ndarray] = []


def powers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers 0..n-1 of an odd number modulo 2^64, and of its inverse."""
    if not _POWERS or len(_POWERS[0]) < n:
        size = max(n, 1 << 18)
        _POWERS[:] = []
        with np.errstate(over="ignore"):
            for base in (_BASE, pow(_BASE, -1, 1 << 64)):
                steps = np.full(size, base, np.uint64)
                steps[0] = 1
                _POWERS.append(np.multiply.accumulate(steps))
    return _POWERS[0][:n], _POWERS[1][:n]


@dataclass(frozen=True, slots=True)
class Units:
    """Units of a batch of texts, in order."""

    codes_N: np.ndarray
    """Code points (uint8 if all are ASCII, else uint32), a newline after each text."""
    text_D: np.ndarray
    """int64: where each text begins in `codes_N`."""
    start_U: np.ndarray
    """int64: where each unit begins in `codes_N`."""
    end_U: np.ndarray
    """int64: one past its last character."""
    hash_U: np.ndarray
    """uint64, equal for equal units in any batch and any process."""
    range_D: np.ndarray
    """int64 [D + 1]: units of text d are [range_D[d], range_D[d + 1])."""

    def of(self, d: int) -> np.ndarray:
        """uint64: hashes of text d."""
        return self.hash_U[self.range_D[d] : self.range_D[d + 1]]

    def spans(self, d: int) -> tuple[np.ndarray, np.ndarray]:
        """int64, int64: where the units of text d begin and end in that text."""
        part = slice(int(self.range_D[d]), int(self.range_D[d + 1]))
        return self.start_U[part] - self.text_D[d], self.end_U[part] - self.text_D[d]


def units(texts: Sequence[str], cut: Cut = WORDS) -> Units:
    """The units of a batch of texts. Memory is about 40 bytes per character: cut large batches
    (`portions`)."""
    kinds, hashes = tables(cut)
    joined = "\n".join(texts) + "\n"
    codes: np.ndarray
    if joined.isascii():
        data = joined.encode()
        codes = np.frombuffer(data, np.uint8)
        kind_N = np.frombuffer(data.translate(_ascii(cut)), np.uint8)
        mix_N = hashes.take(codes)
    else:
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        at = np.minimum(codes, _TOP)
        kind_N = kinds.take(at)
        mix_N = hashes.take(at)
        if codes.max() > _TOP:
            far = np.flatnonzero(codes > _TOP)
            mix_N[far] = mixed(codes[far].astype(np.uint64))
    change = np.ones(len(codes) + 1, np.bool_)
    np.not_equal(kind_N[1:], kind_N[:-1], out=change[1:-1])
    alone = kind_N == ALONE
    there = kind_N != PART
    if cut.joins:
        change[1:-1] |= alone[1:] & (codes[1:] != codes[:-1])
        alone = np.zeros(1, np.bool_)
    start = np.flatnonzero((change[:-1] | alone) & there)
    end = np.flatnonzero((change[1:] | alone) & there) + 1
    up, down = powers(len(codes))
    sums = np.zeros(len(codes) + 1, np.uint64)
    mix_N *= up
    np.cumsum(mix_N, out=sums[1:])
    hash_U = sums[end]
    hash_U -= sums[start]
    hash_U *= down[start]
    hash_U ^= hash_U >> np.uint64(31)
    hash_U *= np.uint64(0x94D049BB133111EB)
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    text_D = np.cumsum(sizes + 1) - sizes - 1
    range_D = np.append(np.searchsorted(start, text_D), len(start))
    return Units(codes, text_D, start, end, hash_U, range_D)


@lru_cache(maxsize=4)
def _ascii(cut: Cut) -> bytes:
    return tables(cut)[0][:256].tobytes()


def portions(texts: Sequence[str], most: int = 1 << 16) -> Iterator[Sequence[str]]:
    """Slices of the texts of about `most` characters, which a processor's cache holds."""
    first = used = 0
    for k, text in enumerate(texts):
        used += len(text)
        if used >= most:
            yield texts[first : k + 1]
            first, used = k + 1, 0
    if first < len(texts):
        yield texts[first:]


def joined(hash_U: np.ndarray, first: np.ndarray) -> np.ndarray:
    """uint64: a hash of the units from each place in `first` (ascending, from 0) up to the next one."""
    up, down = powers(len(hash_U))
    if not len(first):
        return np.zeros(0, np.uint64)
    out = np.add.reduceat(hash_U * up, first) * down[first]
    out ^= out >> np.uint64(32)
    out *= np.uint64(0x9E3779B97F4A7C15)
    return out ^ (out >> np.uint64(29))


def windows(hash_U: np.ndarray, n: int) -> np.ndarray:
    """uint64 [max(0, U - n + 1)]: a hash of every n units in a row."""
    if len(hash_U) < n:
        return np.zeros(0, np.uint64)
    up, down = powers(len(hash_U))
    sums = np.zeros(len(hash_U) + 1, np.uint64)
    np.cumsum(hash_U * up, out=sums[1:])
    out = sums[n:] - sums[:-n]
    out *= down[: len(out)]
    out ^= out >> np.uint64(32)
    out *= np.uint64(0x9E3779B97F4A7C15)
    out ^= out >> np.uint64(29)
    return out


def digest(*texts: str) -> tuple[int, int]:
    """128 bits of texts, told apart by their lengths, as two 64-bit numbers."""
    h = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        h.update(len(data).to_bytes(8, "little") + data)
    raw = h.digest()
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")


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
