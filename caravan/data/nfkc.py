"""NFKC (Unicode Standard Annex 15) in time linear in the text, and where each of its characters came from.

`unicodedata.normalize` sorts combining marks by insertion: a few thousand of them in a row, as in a mutilated
web page, take seconds and a million take days. Runs of marks are put in canonical order here first; the
answer is the same.

Only pieces that NFKC changes are looked at to tell places: a piece begins at a character that joins nothing
before it and ends before the next such character, so that pieces can be normalised one by one."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from functools import lru_cache
from itertools import chain

TOP = 0x33480
"""Code points from here on neither change nor join what stands before them."""
LONG = 32
"""Runs of more marks than this are put in order first."""


def nfkc(text: str) -> str:
    """The text in NFKC."""
    if text.isascii() or unicodedata.is_normalized("NFKC", text):
        return text
    return unicodedata.normalize("NFKC", _patterns()[1].sub(_ordered, text))


def _ordered(run: re.Match[str]) -> str:
    """A run of marks in canonical order: the same text to Unicode."""
    marks = chain.from_iterable(unicodedata.normalize("NFKD", mark) for mark in run[0])
    return "".join(sorted(marks, key=unicodedata.combining))


class Places:
    """Places in a text by those in its NFKC. Cost: one regular expression over the text, and a few steps for
    every piece that changes its length."""

    def __init__(self, text: str) -> None:
        self._from: list[int] = []  # of each piece in the NFKC,
        self._to: list[int] = []
        self._begin: list[int] = []  # and in the text
        self._end: list[int] = []
        known: dict[str, int] = {}
        shift = 0
        for piece in _patterns()[0].finditer(text):
            begin, end = piece.span()
            size = known.get(piece[0]) if end - begin < LONG else len(nfkc(piece[0]))
            if size is None:
                size = known[piece[0]] = len(nfkc(piece[0]))
            if size == end - begin == 1:
                continue
            self._from.append(begin + shift)
            self._to.append(begin + shift + size)
            self._begin.append(begin)
            self._end.append(end)
            shift += size - (end - begin)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """[start, stop) of the NFKC, in the text; not empty. A piece is inside as a whole or not at all."""
        return self._place(start)[0], self._place(stop - 1)[1]

    def _place(self, at: int) -> tuple[int, int]:
        k = bisect_right(self._from, at) - 1
        if k < 0:
            return at, at + 1
        if at < self._to[k]:
            return self._begin[k], self._end[k]
        own = at - self._to[k] + self._end[k]
        return own, own + 1


@lru_cache(maxsize=1)
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """(pieces that NFKC may change, long runs of marks), from the tables of this Python's Unicode."""
    apart = [unicodedata.normalize("NFKD", chr(c)) for c in range(TOP)]
    seconds = {chr(c) for c in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}  # Hangul vowels, finals
    for c in range(TOP):
        parts = unicodedata.decomposition(chr(c)).split()
        if len(parts) == 2 and parts[0][0] != "<":
            seconds.add(chr(int(parts[1], 16)))
    joins = [c for c, part in enumerate(apart) if unicodedata.combining(part[0]) or part[0] in seconds]
    marks = [c for c, part in enumerate(apart) if all(map(unicodedata.combining, part))]
    changes = [c for c in range(TOP) if unicodedata.normalize("NFKC", chr(c)) != chr(c)]
    joining = _ranges(joins)
    pieces = re.compile(f"[^{joining}]?[{joining}]+|[{_ranges(changes)}]")
    return pieces, re.compile(f"[{_ranges(marks)}]{{{LONG},}}")


def _ranges(codes: list[int]) -> str:
    """Code points, ascending, as the inside of a character class."""
    out: list[list[int]] = []
    for code in codes:
        if out and code == out[-1][1] + 1:
            out[-1][1] = code
        else:
            out.append([code, code])
    return "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in out)
