"""Benchmark text in training text: runs of 13 words, compared word by word (Brown et al. 2020, GPT-3,
appendix C).

Words are compared after NFKC and lower case: runs of letters, numbers, and every operator and Han character
by itself. A wanted text is found where 13 of its words stand in a row; one of fewer words must stand there as
a whole, and one of fewer than `fewest` says nothing and is not looked for. Windows of words are looked up by
a 64-bit hash, and every hit is then compared word by word, so that nothing is found that is not there.

GPT-3 cuts the match and 200 characters on either side, drops pieces shorter than 200 and documents cut into
more than ten. Overlapping matches are one match here; the published reimplementations count each 13-gram, so
that a passage of 23 words drops the document.

Legend: U units (words) of a batch, G n-grams that are wanted, T wanted texts."""

from __future__ import annotations

import re
import sys
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from caravan.data.dedup.units import BENCHMARK, portions, units, windows

NGRAM = 13
FEWEST = 8
_WORD = re.compile(r"\d+|[\u3400-\u9fff]|[^\W\d\u3400-\u9fff]+|[+\-*/=<>%]")
"""The same units as BENCHMARK's."""
_FILTER_BITS = 22
_JOINS = frozenset(map(chr, (*range(0x1160, 0x1200), 0xFF9E, 0xFF9F)))
"""Join what stands before them though they are no combining marks: Hangul vowels and finals, halfwidth
voicing."""


@dataclass(frozen=True, slots=True)
class Hit:
    """Words of a text that are wanted: characters [start, stop), and the n-gram they are."""

    start: int
    stop: int
    gram: int


def words(text: str) -> list[str]:
    """What is compared."""
    return [word.lower() for word in _WORD.findall(_folded(text))]


def _folded(text: str) -> str:
    return text if unicodedata.is_normalized("NFKC", text) else unicodedata.normalize("NFKC", text)


@dataclass(frozen=True, slots=True)
class _Table:
    """Wanted n-grams of one n, by their hashes."""

    hashes: np.ndarray
    """uint64, ascending."""
    numbers: np.ndarray
    near: np.ndarray
    """bool by the first bits of a hash: most windows need no search."""

    def lookup(self, hash_U: np.ndarray) -> Iterator[tuple[int, int]]:
        """(window, first place in the table with its hash) of every window whose hash is wanted."""
        at = np.flatnonzero(self.near[hash_U >> np.uint64(64 - _FILTER_BITS)])
        place = np.searchsorted(self.hashes, hash_U[at])
        same = self.hashes[np.minimum(place, len(self.hashes) - 1)] == hash_U[at]
        return zip(at[same].tolist(), place[same].tolist(), strict=True)

    def numbers_at(self, first: int) -> Iterator[int]:
        """Numbers of the n-grams that share a hash, from the first on."""
        for k in range(first, len(self.hashes)):
            if self.hashes[k] != self.hashes[first]:
                return
            yield int(self.numbers[k])


class Index:
    """n-grams of wanted texts. Texts are numbered as they are added, n-grams from 0 to `len(index)`.

    About 150 bytes per n-gram, 8 per word."""

    def __init__(self, fewest: int = FEWEST, ngram: int = NGRAM) -> None:
        self.fewest, self.ngram = fewest, ngram
        self.texts: list[tuple[str, ...]] = []
        self._key: dict[int, int] = {}
        self._hash, self._text, self._place, self._size = (array(code) for code in "QIIB")
        self._more: dict[int, list[int]] = {}
        self._made: dict[int, _Table] = {}

    def add(self, text: str) -> bool:
        """Want a text; whether it is long enough to be looked for."""
        number = len(self.texts)
        own = tuple(map(sys.intern, words(text)))
        self.texts.append(own)
        self._made.clear()
        for place, hashed in enumerate(self._hashes(text, len(own))):
            key, known = self._find(hashed, own[place : place + self.ngram])
            if known is None:
                self._key[key] = len(self._hash)
                self._hash.append(hashed)
                self._text.append(number)
                self._place.append(place)
                self._size.append(min(self.ngram, len(own)))
            elif self._text[known] != number:
                more = self._more.setdefault(known, [self._text[known]])
                if more[-1] != number:
                    more.append(number)
        return len(own) >= self.fewest

    def _hashes(self, text: str, count: int) -> list[int]:
        if count < self.fewest:
            return []
        return windows(units([_folded(text)], BENCHMARK).hash_U, min(self.ngram, count)).tolist()

    def _find(self, key: int, gram: tuple[str, ...]) -> tuple[int, int | None]:
        """(key under which an n-gram is or would be known, its number); other words may have its hash."""
        while (known := self._key.get(key)) is not None and self._words(known) != gram:
            key = (key + 1) % (1 << 64)
        return key, known

    def _words(self, gram: int) -> tuple[str, ...]:
        place = self._place[gram]
        return self.texts[self._text[gram]][place : place + self._size[gram]]

    def __len__(self) -> int:
        return len(self._hash)

    def owners(self, gram: int) -> Sequence[int]:
        """Wanted texts that have an n-gram, ascending."""
        return self._more.get(gram) or (self._text[gram],)

    def covered(self, text: int, found: Iterable[int]) -> float:
        """Share of a wanted text's words that stand in n-grams that were found."""
        own, inside = self.texts[text], set(found)
        marked: set[int] = set()
        for place, hashed in enumerate(self._hashes(" ".join(own), len(own))):
            gram = own[place : place + self.ngram]
            if self._find(hashed, gram)[1] in inside:
                marked.update(range(place, place + len(gram)))
        return len(marked) / max(1, len(own))

    def prepare(self) -> dict[int, _Table]:
        """n -> its table; made at the first search, or before processes are forked that share it."""
        if not self._made and self._hash:
            hashes, sizes = np.array(self._hash, np.uint64), np.array(self._size)
            for n in np.unique(sizes).tolist():
                numbers = np.flatnonzero(sizes == n)
                numbers = numbers[np.argsort(hashes[numbers], kind="stable")]
                near = np.zeros(1 << _FILTER_BITS, np.bool_)
                near[hashes[numbers] >> np.uint64(64 - _FILTER_BITS)] = True
                self._made[n] = _Table(hashes[numbers], numbers, near)
        return self._made

    def search(self, texts: Sequence[str]) -> list[list[Hit]]:
        """Hits in each text, in order of place; they may overlap."""
        out: list[list[Hit]] = []
        for part in portions(texts):
            out += self._search(part)
        return out

    def _search(self, texts: Sequence[str]) -> list[list[Hit]]:
        folded = [_folded(text) for text in texts]
        cut = units(folded, BENCHMARK)
        found: list[list[Hit]] = [[] for _ in texts]
        for n, table in self.prepare().items():
            for start, first in table.lookup(windows(cut.hash_U, n)):
                d = int(np.searchsorted(cut.range_D, start, side="right")) - 1
                if start + n > cut.range_D[d + 1]:
                    continue
                begin = (cut.start_U[start : start + n] - cut.text_D[d]).tolist()
                end = (cut.end_U[start : start + n] - cut.text_D[d]).tolist()
                here = tuple(folded[d][a:b].lower() for a, b in zip(begin, end, strict=True))
                found[d] += [
                    Hit(begin[0], end[-1], k) for k in table.numbers_at(first) if self._words(k) == here
                ]
        return [
            _placed(text, one, sorted(hits, key=lambda h: (h.start, h.stop)))
            for text, one, hits in zip(texts, folded, found, strict=True)
        ]


def _placed(text: str, folded: str, hits: list[Hit]) -> list[Hit]:
    """Hits in the folded text, as characters of the text itself."""
    if not hits or text == folded:
        return hits
    start, stop, at = [], [], 0
    while at < len(text):  # NFKC joins a letter and what combines with it, and little else
        end = at + 1
        while end < len(text) and (unicodedata.combining(text[end]) or text[end] in _JOINS):
            end += 1
        size = len(unicodedata.normalize("NFKC", text[at:end]))
        start += [at] * size
        stop += [end] * size
        at = end
    last = len(start) - 1
    return [Hit(start[min(h.start, last)], stop[min(h.stop - 1, last)], h.gram) for h in hits]


def merged(hits: Iterable[Hit], around: int = 0, size: int | None = None) -> list[tuple[int, int]]:
    """Intervals of characters that hits cover, widened on both sides; what touches is one."""
    out: list[tuple[int, int]] = []
    for start, stop in sorted((max(0, h.start - around), h.stop + around) for h in hits):
        stop = stop if size is None else min(stop, size)
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return out


def pieces(text: str, hits: Iterable[Hit], around: int = 200, least: int = 200) -> tuple[list[str], int]:
    """(what is left of a text, how often it was cut): GPT-3's rule."""
    cuts = merged(hits, around, len(text))
    edges = [0, *(edge for cut in cuts for edge in cut), len(text)]
    left = [text[a:b].strip() for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return [piece for piece in left if len(piece) >= least], len(cuts)


def masked(text: str, hits: Iterable[Hit], put: str = "…") -> str:
    """The text with every match written as `put`."""
    parts, at = [], 0
    for start, stop in merged(hits):
        parts += [text[at:start], put]
        at = stop
    return "".join([*parts, text[at:]])


def template(index: Index, owner_of: Sequence[int], most: int) -> set[int]:
    """n-grams that more than `most` items share: a prompt's wording, not a question. An item that has no
    others keeps its own. `owner_of` says which item each wanted text belongs to."""
    shared = {
        gram for gram in range(len(index)) if len({owner_of[t] for t in index.owners(gram)}) > most
    }  # fmt: skip
    if not shared:
        return shared
    free = {owner_of[t] for gram in range(len(index)) if gram not in shared for t in index.owners(gram)}
    return {gram for gram in shared if all(owner_of[t] in free for t in index.owners(gram))}


def common(counts: Counter[int], most: int) -> set[int]:
    """n-grams that stand in more than `most` documents: idioms, licences, famous lines (GPT-3: ten); 0 spares
    none."""
    return {gram for gram, n in counts.items() if n > most} if most else set()
