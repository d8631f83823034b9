"""MinHash signatures and locality-sensitive hashing (Broder 1997; Leskovec et al., Mining of Massive
Datasets, ch. 3).

A text is the set of its 5-grams of units. The k-th number of its signature is the least value of A_k x + B_k
modulo 2^32 over all 5-gram hashes x; two signatures agree in a place with probability J, the Jaccard
similarity of the sets, so that the share of agreeing places estimates J with variance J (1 - J) / K.
Signatures are cut into bands; texts meet if all rows of one band agree:

    P(meet) = 1 - (1 - J^rows)^bands

14 bands of 8 (FineWeb's setting) pass half at J = 0.68. Those that meet are then compared by whole signatures
(`similarity`); 0 takes every meeting for a duplicate.

Numbers are kept as they are: two tables of sums are not the same text.

Legend: K places of a signature (bands x rows), U units, G 5-grams, D texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from caravan.data.columns import Column
from caravan.data.dedup.keepers import Keyed, Links, Ranks
from caravan.data.dedup.units import WORDS, mixed, portions, units
from caravan.data.permute import mix
from caravan.types import UserError

GRAM = 5
_CHUNK = 1024
_C = [np.uint64(mix(3, k) | 1) for k in range(GRAM)]


@dataclass(frozen=True, slots=True)
class Setting:
    """Bands, rows, and from which share of agreeing places two texts that met count as near duplicates."""

    bands: int = 14
    rows: int = 8
    similarity: float = 0.75

    def __post_init__(self) -> None:
        if min(self.bands, self.rows) < 1 or self.bands * self.rows > 10_000:
            raise UserError(f"{self.bands} bands of {self.rows} rows make no signature", "try 14 of 8")
        if not 0 <= self.similarity <= 1:
            raise UserError(f"a similarity lies between 0 and 1, not at {self.similarity}")

    @property
    def places(self) -> int:
        return self.bands * self.rows

    def meet(self, jaccard: float) -> float:
        """Probability that two texts meet in a band."""
        return 1 - (1 - jaccard**self.rows) ** self.bands

    def agree(self, jaccard: float) -> float:
        """Probability that enough places agree, were the texts to meet for certain."""
        need = math.ceil(self.similarity * self.places - 1e-9)
        if not 0 < jaccard < 1:
            return float(jaccard >= 1 or need <= 0)
        k, yes, no = self.places, math.log(jaccard), math.log1p(-jaccard)
        ways = math.lgamma(k + 1)  # as logarithms: of 9,000 places no float holds the ways to choose half
        return sum(
            math.exp(ways - math.lgamma(n + 1) - math.lgamma(k - n + 1) + n * yes + (k - n) * no)
            for n in range(need, k + 1)
        )

    def curve(self) -> list[dict[str, float]]:
        """Jaccard similarity, probability to meet, probability to be found (at most; both must happen), and
        the standard error of the estimate."""
        return [
            {
                "jaccard": j / 20,
                "meet": round(self.meet(j / 20), 4),
                "found": round(min(self.meet(j / 20), self.agree(j / 20)), 4),
                "error": round(math.sqrt(j / 20 * (1 - j / 20) / self.places), 4),
            }
            for j in range(6, 21)
        ]


def signatures(texts: Sequence[str], places: int = 112) -> np.ndarray:
    """uint32 [D, K]: the signature of every text, whatever the batch it is in. A text shorter than a 5-gram
    is one shingle."""
    out = np.empty((len(texts), places), np.uint32)
    done = 0
    for part in portions(texts):
        cut = units(part, WORDS)
        grams = _grams(cut.hash_U)
        for d in range(len(part)):
            first, last = int(cut.range_D[d]), int(cut.range_D[d + 1])
            own = grams[first : last - GRAM + 1] if last - first >= GRAM else _short(cut.hash_U[first:last])
            _least(own, out[done + d])
        done += len(part)
    return out


def _grams(hash_U: np.ndarray) -> np.ndarray:
    """uint32 [U - 4]: a hash of every five units in a row (multilinear, then mixed)."""
    count = max(0, len(hash_U) - GRAM + 1)
    total = hash_U[:count] * _C[0]
    for k in range(1, GRAM):
        total += hash_U[k : k + count] * _C[k]
    total ^= total >> np.uint64(31)
    total *= np.uint64(0x94D049BB133111EB)
    return (total >> np.uint64(32)).astype(np.uint32)


def _short(hash_U: np.ndarray) -> np.ndarray:
    padded = np.zeros(GRAM, np.uint64)
    padded[: len(hash_U)] = hash_U
    return _grams(padded)


_FAMILY: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}


def _family(places: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A odd and B random, uint32 [K, 1], and a place to work in."""
    if places not in _FAMILY:
        a = np.array([mix(1, k) >> 31 | 1 for k in range(places)], np.uint64).astype(np.uint32)
        b = np.array([mix(2, k) >> 32 for k in range(places)], np.uint64).astype(np.uint32)
        _FAMILY[places] = a[:, None], b[:, None], np.empty(places * _CHUNK, np.uint32)
    return _FAMILY[places]


def _least(grams: np.ndarray, out: np.ndarray) -> None:
    """Signature of 5-gram hashes into `out`, uint32 [K]."""
    a, b, room = _family(len(out))
    out[:] = 0xFFFFFFFF
    for start in range(0, len(grams), _CHUNK):
        part = grams[None, start : start + _CHUNK]
        work = room[: len(out) * part.shape[1]].reshape(len(out), part.shape[1])
        np.multiply(a, part, out=work)
        work += b
        np.minimum(out, work.min(axis=1), out=out)


def band_keys(signature_DK: np.ndarray, setting: Setting) -> np.ndarray:
    """uint64 [bands, D]: one key per band."""
    rows = signature_DK.reshape(len(signature_DK), setting.bands, setting.rows).astype(np.uint64)
    key = np.zeros(rows.shape[:2], np.uint64)
    for r in range(setting.rows):
        key = mixed(key ^ rows[:, :, r])
    return np.ascontiguousarray(key.T)


class NearDuplicates:
    """Signatures on disk (4 K bytes per text), and the pairs that meet and agree."""

    def __init__(self, folder: Path, setting: Setting, memory_bytes: int) -> None:
        self.setting = setting
        self._memory = memory_bytes
        self._table = Column(folder, np.uint32, setting.places)
        self._bands = [Keyed(folder) for _ in range(setting.bands)]
        self.met = self.agreed = 0
        """Pairs compared in some band, and those of them alike."""

    def add(self, signature_DK: np.ndarray) -> None:
        """Signatures of the next texts, uint32 [D, K]."""
        assert signature_DK.shape[1] == self.setting.places, "another number of places"
        self._table.add(signature_DK)
        for band, keys in zip(self._bands, band_keys(signature_DK, self.setting), strict=True):
            band.add(keys)

    def link(self, ranks: Ranks, links: Links, without: Column | None = None) -> None:
        """Link what meets in a band and agrees, texts marked in `without` apart. In a band each text is
        compared with the first of its run (by hash of the text) and with the one before it: that many
        comparisons, not their square."""
        for band in self._bands:
            for key, place in band.groups(ranks, self._memory, without):
                new = np.ones(len(key), np.bool_)
                np.not_equal(key[1:], key[:-1], out=new[1:])
                at = np.arange(len(key))
                first = np.maximum.accumulate(np.where(new, at, 0))
                later = np.flatnonzero(~new)
                self._compare(place[later], place[first[later]], links)
                later = later[first[later] < later - 1]
                self._compare(place[later], place[later - 1], links)
            band.close()

    def _compare(self, a_E: np.ndarray, b_E: np.ndarray, links: Links, chunk: int = 1 << 14) -> None:
        for start in range(0, len(a_E), chunk):
            a, b = a_E[start : start + chunk], b_E[start : start + chunk]
            alike = self.estimate(a, b) >= self.setting.similarity - 1e-9
            self.met += len(a)
            self.agreed += int(alike.sum())
            links.add(a[alike], b[alike])

    def estimate(self, a_E: np.ndarray, b_E: np.ndarray) -> np.ndarray:
        """float [E]: share of places in which texts agree pairwise: their Jaccard similarity, estimated."""
        out = np.zeros(len(a_E))
        for at in range(0, len(a_E), _CHUNK):
            part = slice(at, at + _CHUNK)
            out[part] = (self._table.take(a_E[part]) == self._table.take(b_E[part])).mean(axis=1)
        return out

    def close(self) -> None:
        """Remove the files."""
        self._table.close()
        for band in self._bands:
            band.close()
