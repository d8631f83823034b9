"""Benchmark text in training text: runs of 13 words, compared word by word (Brown et al. 2020, GPT-3,
appendix C).

Words are compared after NFKC and lower case: runs of letters, numbers, and every operator and Han character
by itself. A wanted text is found where 13 of its words stand in a row; one of fewer words must stand there as
a whole, and one of fewer than `fewest` says nothing and is not looked for. Windows of words are looked up by
a 64-bit hash, and every hit is then compared word by word, so that nothing is found that is not there.

GPT-3 cuts the match and 200 characters on either side, drops pieces shorter than 200 and documents cut into
more than ten. Overlapping matches are one match here; the published reimplementations count each 13-gram, so
that a passage of 23 words drops the document.

The time is linear in the text: a few numpy passes, and one step per hit and per word that hits cover.

Legend: U units (words) of a batch, H windows of it whose hash is wanted, D texts of it."""

from __future__ import annotations

import re
import sys
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from caravan.data.dedup.units import BENCHMARK, Units, portions, units, windows
from caravan.data.nfkc import Places, nfkc

NGRAM = 13
FEWEST = 8
_WORD = re.compile(r"\d+|[\u3400-\u9fff]|[^\W\d\u3400-\u9fff]+|[+\-*/=<>%]")
"""The same units as BENCHMARK's."""
_SPARSE, _MOST_BITS = 8, 28
"""A table of first bits has at least this many places per hash, so that about one window in ten is looked
up for nothing; but no more places than 2 to the second (bytes)."""


@dataclass(frozen=True, slots=True)
class Hit:
    """Words of a text that are wanted: characters [start, stop), and the n-gram they are."""

    start: int
    stop: int
    gram: int


def words(text: str) -> list[str]:
    """What is compared."""
    return _words(nfkc(text))


def _words(folded: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(folded)]


@dataclass(frozen=True, slots=True)
class _Table:
    """Wanted n-grams of one n, by their hashes."""

    hashes: np.ndarray
    """uint64, ascending, each once."""
    numbers: np.ndarray
    """int64: the first n-gram with each hash."""
    more: dict[int, list[int]]
    """Place of a hash -> all n-grams that have it, where they are several."""
    near: np.ndarray
    """bool by the first bits of a hash: most windows need no search."""
    shift: np.uint64
    """Leaves those bits of a hash."""

    def lookup(self, hash_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [H], int64 [H]: windows whose hash is wanted, and its place in the table."""
        at = np.flatnonzero(self.near[hash_U >> self.shift])
        place = np.minimum(np.searchsorted(self.hashes, hash_U[at]), len(self.hashes) - 1)
        same = self.hashes[place] == hash_U[at]
        return at[same], place[same]


class Index:
    """n-grams of wanted texts. Texts are numbered as they are added, n-grams from 0 to `len(index)`.

    About 150 bytes per n-gram, 8 per word."""

    def __init__(self, fewest: int = FEWEST, ngram: int = NGRAM) -> None:
        self.fewest, self.ngram = fewest, ngram
        self.texts: list[tuple[str, ...]] = []
        self._key: dict[int, int] = {}
        self._hash, self._text, self._place, self._size = (array(code) for code in "QIIB")
        self._grams, self._first = array("I"), array("Q", [0])
        self._more: dict[int, list[int]] = {}
        self._made: dict[int, _Table] = {}

    def add(self, text: str) -> bool:
        """Want a text; whether it is long enough to be looked for."""
        return self.extend([text])[0]

    def extend(self, texts: Sequence[str]) -> list[bool]:
        """Want texts, which is faster than one by one; for each, whether it is long enough."""
        self._made.clear()
        out: list[bool] = []
        for part in portions(texts):
            folded = [nfkc(text) for text in part]
            cut = units(folded, BENCHMARK)
            full_U = windows(cut.hash_U, self.ngram)
            for d, text in enumerate(folded):
                own = tuple(map(sys.intern, _words(text)))
                out.append(len(own) >= self.fewest)
                if not out[-1]:
                    hashes = full_U[:0]
                elif len(own) >= self.ngram:
                    first = int(cut.range_D[d])
                    hashes = full_U[first : first + len(own) - self.ngram + 1]
                else:
                    hashes = windows(cut.of(d), len(own))
                self._take(own, hashes.tolist())
        return out

    def _take(self, own: tuple[str, ...], hashes: Sequence[int]) -> None:
        """Number the n-grams of a text's words."""
        number, size = len(self.texts), min(self.ngram, len(own))
        self.texts.append(own)
        for place, hashed in enumerate(hashes):
            key, known = self._find(hashed, own, place, size)
            if known is None:
                known = self._key[key] = len(self._hash)
                self._hash.append(hashed)
                self._text.append(number)
                self._place.append(place)
                self._size.append(size)
            elif self._text[known] != number:
                more = self._more.setdefault(known, [self._text[known]])
                if more[-1] != number:
                    more.append(number)
            self._grams.append(known)
        self._first.append(len(self._grams))

    def _find(self, key: int, own: tuple[str, ...], place: int, size: int) -> tuple[int, int | None]:
        """(key under which an n-gram is or would be known, its number); other words may have its hash."""
        while (known := self._key.get(key)) is not None:
            if self._words(known) == own[place : place + size]:
                break
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

    def shared(self) -> Iterable[tuple[int, Sequence[int]]]:
        """(n-gram, wanted texts that have it) of every n-gram that several have."""
        return self._more.items()

    def grams(self, text: int) -> Sequence[int]:
        """n-grams of a wanted text, in order of place; none if it is too short."""
        return self._grams[self._first[text] : self._first[text + 1]]

    def covered(self, text: int, found: Collection[int]) -> float:
        """Share of a wanted text's words that stand in n-grams that were found (a set, best)."""
        size = min(self.ngram, len(self.texts[text]))
        count = end = 0
        for place, gram in enumerate(self.grams(text)):
            if gram in found:
                count += place + size - max(place, end)
                end = place + size
        return count / max(1, len(self.texts[text]))

    def prepare(self) -> dict[int, _Table]:
        """n -> its table; made at the first search, or before processes are forked that share it."""
        if not self._made and self._hash:
            hashes, sizes = np.array(self._hash, np.uint64), np.array(self._size)
            for n in np.unique(sizes).tolist():
                numbers = np.flatnonzero(sizes == n)
                numbers = numbers[np.argsort(hashes[numbers], kind="stable")]
                once, first, count = np.unique(hashes[numbers], return_index=True, return_counts=True)
                more = {
                    k: numbers[first[k] : first[k] + count[k]].tolist()
                    for k in np.flatnonzero(count > 1).tolist()
                }
                bits = min(_MOST_BITS, (_SPARSE * len(once)).bit_length())
                near, shift = np.zeros(1 << bits, np.bool_), np.uint64(64 - bits)
                near[once >> shift] = True
                self._made[n] = _Table(once, numbers[first], more, near, shift)
        return self._made

    def search(self, texts: Sequence[str]) -> list[list[Hit]]:
        """Hits in each text, in order of place; they may overlap."""
        out: list[list[Hit]] = []
        for part in portions(texts):
            out += self._search(part)
        return out

    def _search(self, texts: Sequence[str]) -> list[list[Hit]]:
        folded = [nfkc(text) for text in texts]
        cut = units(folded, BENCHMARK)
        found: list[list[Hit]] = [[] for _ in texts]
        for n, table in self.prepare().items():
            at_H, place_H = table.lookup(windows(cut.hash_U, n))
            text_H = np.searchsorted(cut.range_D, at_H, side="right") - 1
            within = at_H + n <= cut.range_D[text_H + 1]
            at_H, place_H, text_H = at_H[within], place_H[within], text_H[within]
            if not len(at_H):
                continue
            number_H = table.numbers[place_H].tolist()
            here_H = _windows_of_words(folded, cut, at_H, n)
            begin_H = (cut.start_U[at_H] - cut.text_D[text_H]).tolist()
            end_H = (cut.end_U[at_H + n - 1] - cut.text_D[text_H]).tolist()
            for h, (d, here) in enumerate(zip(text_H.tolist(), here_H, strict=True)):
                for gram in table.more.get(int(place_H[h])) or (number_H[h],):
                    if self._words(gram) == here:
                        found[d].append(Hit(begin_H[h], end_H[h], gram))
        return [
            _placed(text, one, sorted(hits, key=lambda h: (h.start, h.stop)))
            for text, one, hits in zip(texts, folded, found, strict=True)
        ]


def _windows_of_words(
    folded: Sequence[str], cut: Units, at_H: np.ndarray, n: int
) -> Iterator[tuple[str, ...]]:
    """The n words from each window's first on. A word is read once, however many windows it is in."""
    covered_U = np.zeros(len(cut.hash_U), np.bool_)
    for k in range(n):
        covered_U[at_H + k] = True
    joined = "\n".join(folded)
    begin, end = cut.start_U[covered_U].tolist(), cut.end_U[covered_U].tolist()
    read = [joined[a:b].lower() for a, b in zip(begin, end, strict=True)]
    for first in (np.cumsum(covered_U)[at_H] - 1).tolist():
        yield tuple(read[first : first + n])


def _placed(text: str, folded: str, hits: list[Hit]) -> list[Hit]:
    """Hits in the folded text, as characters of the text itself."""
    if not hits or text == folded:
        return hits
    places = Places(text)
    return [Hit(*places.span(h.start, h.stop), h.gram) for h in hits]


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
    shared = {gram for gram, texts in index.shared() if len({owner_of[t] for t in texts}) > most}
    touched = {owner_of[t] for gram in shared for t in index.owners(gram)}
    free = {
        owner_of[t] for t in range(len(index.texts))
        if owner_of[t] in touched and not shared.issuperset(index.grams(t))
    }  # fmt: skip
    return {gram for gram in shared if all(owner_of[t] in free for t in index.owners(gram))}


def common(counts: Counter[int], most: int) -> set[int]:
    """n-grams that stand in more than `most` documents: idioms, licences, famous lines (GPT-3: ten); 0 spares
    none."""
    return {gram for gram, n in counts.items() if n > most} if most else set()
