"""A batch of texts as flat arrays, made once and shared by every family of signals.

All documents lie end to end with one newline after each, so that a batch of a megabyte costs a few dozen
numpy passes, whatever the number of documents. Only whole numbers cross document borders (counts and hashes
modulo 2^64), hence no signal depends on which documents share a batch.

A *word* is a run of characters without white space; its *letters* are what is left of it without punctuation
and symbols (Unicode categories P and S), lower-cased for hashing ("Don't" is "dont"), as RedPajama-v2
normalises. A *line* is one that is not blank, without white space at its ends.

Legend: D documents, N characters (separators included), W words, V words with letters, L lines, M all lines.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np

SPACE, ALPHA, DIGIT, MARK, HAN, UPPER, OTHER = 1, 4, 8, 16, 32, 64, 128
"""Bits of a character: white space, letter, digit, punctuation or symbol, Han, upper case; and OTHER, which
is no letter, no mark and no white space."""
_TOP = 0x33480
"""Characters from here on have no properties we look at (tags, private use)."""
_HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3347F))


@lru_cache(maxsize=1)
def tables() -> tuple[np.ndarray, np.ndarray]:
    """(bits uint8, hash of the lower-cased character uint64) by code point; the last entry is for all
    others."""
    bits = np.zeros(_TOP + 1, np.uint8)
    lower = np.arange(_TOP + 1, dtype=np.uint64)
    for code in range(_TOP):
        char = chr(code)
        kind = unicodedata.category(char)
        if kind in ("Cn", "Lo"):  # most code points; this saves half a second
            bits[code] = ALPHA if kind == "Lo" else 0
            continue
        bits[code] = (
            SPACE * char.isspace()
            | ALPHA * char.isalpha()
            | DIGIT * char.isdigit()
            | MARK * (kind[0] in "PS")
            | UPPER * char.isupper()
        )
        if kind[0] == "L" and len(low := char.lower()) == 1:
            lower[code] = ord(low)
    for first, last in _HAN:
        part = bits[first : last + 1]
        part[(part & ALPHA) > 0] |= HAN
    bits[0x3007] |= HAN  # the zero is a number to Unicode
    bits[(bits & (ALPHA | MARK | SPACE)) == 0] |= OTHER
    return bits, _mixed(lower)


def _mixed(code: np.ndarray) -> np.ndarray:
    """uint64: code points well mixed."""
    with np.errstate(over="ignore"):
        mixed = (code + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return mixed ^ (mixed >> np.uint64(32))


_BASE = 0xD1342543DE82EF95
_POWERS: list[np.ndarray] = []


def _powers(n: int) -> tuple[np.ndarray, np.ndarray]:
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


class View:
    """Texts of a batch and what can be seen in them. Everything is computed at its first use."""

    def __init__(self, texts: Sequence[str], langs: Sequence[str] = ()) -> None:
        self.texts = texts
        self.langs = list(langs) or [""] * len(texts)
        data = ("\n".join(texts) + "\n").encode("utf-32-le", "surrogatepass")
        self.codes_N = np.frombuffer(data, np.uint32)
        sizes = np.fromiter(map(len, texts), np.int64, len(texts))
        self.end_D = np.cumsum(sizes + 1) - 1
        self.start_D = self.end_D - sizes
        self.chars_D = sizes
        self._places: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def bits_N(self) -> np.ndarray:
        codes = self.codes_N
        return tables()[0][np.minimum(codes, _TOP) if codes.size and codes.max() > _TOP else codes]

    def places(self, bit: int) -> np.ndarray:
        """int64, ascending: positions of the characters that have a bit."""
        if bit not in self._places:
            self._places[bit] = np.flatnonzero((self.bits_N & bit) != 0)
        return self._places[bit]

    def count(self, bit: int) -> np.ndarray:
        """int64 [D]: characters that have a bit. Those of most characters are told from the others."""
        if bit == SPACE:
            return self.chars_D - self.sum_words(self.word_end_W - self.word_start_W)
        if bit == ALPHA:
            return self.chars_D - self.count(SPACE) - self.count(MARK) - self.count(OTHER)
        return self.inside(self.places(bit))

    def occurrences(self, code: int) -> np.ndarray:
        """int64 [D]: how often one character occurs."""
        return self.inside(np.flatnonzero(self.codes_N == code))

    def inside(self, places: np.ndarray) -> np.ndarray:
        """int64 [D]: how many of these sorted character positions fall into each document."""
        return np.searchsorted(places, self.end_D) - np.searchsorted(places, self.start_D)

    # words

    @cached_property
    def _word_edges(self) -> np.ndarray:
        space = (self.bits_N & SPACE).view(np.bool_)
        edges = np.flatnonzero(space[1:] != space[:-1]) + 1
        return edges if space[:1].all() else np.concatenate([[0], edges])

    @property
    def word_start_W(self) -> np.ndarray:
        return self._word_edges[0::2]

    @property
    def word_end_W(self) -> np.ndarray:
        return self._word_edges[1::2]

    @cached_property
    def word_range_D(self) -> np.ndarray:
        """int64 [D + 1]: words of document d are [word_range[d], word_range[d + 1])."""
        return np.append(np.searchsorted(self.word_start_W, self.start_D), len(self.word_start_W))

    @cached_property
    def words_D(self) -> np.ndarray:
        return np.diff(self.word_range_D)

    @cached_property
    def letters_W(self) -> np.ndarray:
        """int64: characters of each word that are neither punctuation nor symbol."""
        marks = self.places(MARK)
        at = np.searchsorted(self.word_start_W, marks, side="right") - 1
        return self.word_end_W - self.word_start_W - np.bincount(at, minlength=len(self.word_start_W))

    def sum_words(self, values_W: np.ndarray) -> np.ndarray:
        """int64 [D]: sum of a whole number per word, over each document."""
        return sums(values_W, self.word_range_D)

    # words with letters: what n-grams are made of

    @cached_property
    def _plain_N(self) -> np.ndarray:
        """Code points of all letters, in order (case kept)."""
        return self.codes_N[(self.bits_N & (SPACE | MARK)) == 0]

    @cached_property
    def has_letters_W(self) -> np.ndarray:
        return self.letters_W > 0

    @cached_property
    def letters_V(self) -> np.ndarray:
        return self.letters_W[self.has_letters_W]

    @cached_property
    def plain_range_D(self) -> np.ndarray:
        """int64 [D + 1]: the range of each document among the words with letters."""
        return np.concatenate([[0], np.cumsum(self.has_letters_W)])[self.word_range_D]

    @cached_property
    def document_V(self) -> np.ndarray:
        """int64: which document a word with letters belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.plain_range_D))

    @cached_property
    def letter_range_V(self) -> np.ndarray:
        """int64 [V + 1]: where the letters of each word begin."""
        return np.concatenate([[0], np.cumsum(self.letters_V)])

    @cached_property
    def hash_V(self) -> np.ndarray:
        """uint64: equal for words whose lower-cased letters are equal, in any batch and any process."""
        codes = self._plain_N
        up, down = _powers(len(codes))
        with np.errstate(over="ignore"):
            far = codes.size and codes.max() > _TOP
            mixed = tables()[1][np.minimum(codes, _TOP) if far else codes]
            if far:
                mixed = np.where(codes > _TOP, _mixed(codes.astype(np.uint64)), mixed)
            mixed *= up
            sums = np.zeros(len(codes) + 1, np.uint64)
            np.cumsum(mixed, out=sums[1:])
            edges = self.letter_range_V
            at = sums[edges]
            # Differences of prefix sums, moved back to exponent 0: position in the batch drops out.
            hashed = (at[1:] - at[:-1]) * down[edges[:-1]]
            return (hashed ^ (hashed >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)

    def sum_plain(self, values_V: np.ndarray) -> np.ndarray:
        """int64 [D]: sum of a whole number per word with letters."""
        return sums(values_V, self.plain_range_D)

    def short_words(self, initials: str) -> tuple[np.ndarray, np.ndarray]:
        """(which words with letters have two to four of them and begin with one of `initials`, those letters
        packed into a uint64, case kept)."""
        sized = np.flatnonzero((self.letters_V >= 2) & (self.letters_V <= 4))
        start = self.letter_range_V[sized]
        chosen = one_of(self._plain_N[start], initials)
        which, start = sized[chosen], start[chosen]
        size = self.letters_V[which]
        last = len(self._plain_N) - 1
        key = np.zeros(len(which), np.uint64)
        for k in range(4):
            code = np.minimum(self._plain_N[np.minimum(start + k, last)], 0xFFFF).astype(np.uint64)
            key |= (code * (size > k)) << np.uint64(16 * k)
        return which, key

    # lines

    @cached_property
    def _line_words(self) -> tuple[np.ndarray, np.ndarray]:
        ends_M = np.flatnonzero(self.codes_N == 10)
        last = np.searchsorted(self.word_start_W, ends_M)
        first = np.concatenate([[0], last[:-1]]).astype(np.int64)
        full = last > first
        return first[full], last[full]

    @property
    def line_first_L(self) -> np.ndarray:
        """int64: first word of each line."""
        return self._line_words[0]

    @property
    def line_last_L(self) -> np.ndarray:
        """int64: one past its last word."""
        return self._line_words[1]

    @cached_property
    def line_start_L(self) -> np.ndarray:
        return self.word_start_W[self.line_first_L]

    @cached_property
    def line_end_L(self) -> np.ndarray:
        return self.word_end_W[self.line_last_L - 1]

    @cached_property
    def line_range_D(self) -> np.ndarray:
        return np.append(np.searchsorted(self.line_start_L, self.start_D), len(self.line_start_L))

    @cached_property
    def lines_D(self) -> np.ndarray:
        return np.diff(self.line_range_D)

    def sum_lines(self, values_L: np.ndarray) -> np.ndarray:
        """int64 [D]: sum of a whole number per line."""
        return sums(values_L, self.line_range_D)

    def last_code_L(self, back: int = 0) -> np.ndarray:
        """uint32: the last character of each line, or the one `back` before it (0 if the line is shorter)."""
        at = self.line_end_L - 1 - back
        return np.where(at >= self.line_start_L, self.codes_N[np.maximum(at, 0)], 0)

    @cached_property
    def ellipsis_L(self) -> np.ndarray:
        """bool: lines that end in ... or …"""
        last = self.last_code_L()
        dots = (last == 46) & (self.last_code_L(1) == 46) & (self.last_code_L(2) == 46)
        return dots | (last == 0x2026)

    @cached_property
    def copied_lines(self) -> np.ndarray:
        """int64 [D, 4]: of lines, and of paragraphs (parted by blank lines): later copies, characters of
        these."""
        rows = np.zeros((len(self), 4), np.int64)
        for row, text in zip(rows, self.texts, strict=True):
            lines = [s for line in text.split("\n") if (s := line.strip())]
            if len(set(lines)) < len(lines):
                row[:2] = _copies(lines)
                row[2:] = _copies([s for part in text.split("\n\n") if (s := part.strip())])
            # Without a line that comes twice no paragraph can.
        return rows

    @cached_property
    def paragraphs_D(self) -> np.ndarray:
        return np.fromiter(
            (sum(1 for part in t.split("\n\n") if part and not part.isspace()) for t in self.texts),
            np.int64,
            len(self),
        )

    @cached_property
    def _ascii(self) -> bytes:
        """All texts, one byte per character, lower-cased; what is not Latin-1 is a question mark."""
        return "\n".join(self.texts).encode("latin-1", "replace").lower()

    def finds(self, phrase: bytes) -> np.ndarray:
        """int64, ascending: where an ASCII phrase in lower case begins, whatever its case in the text."""
        found, at = [], self._ascii.find(phrase)
        while at >= 0:
            found.append(at)
            at = self._ascii.find(phrase, at + len(phrase))
        return np.array(found, np.int64)


def _copies(parts: Sequence[str]) -> tuple[int, int]:
    once = set(parts)
    return len(parts) - len(once), sum(map(len, parts)) - sum(map(len, once))


def sums(values: np.ndarray, ranges_D: np.ndarray) -> np.ndarray:
    """int64 [D]: sum of whole numbers over the range [ranges[d], ranges[d + 1]) of each document."""
    total = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=total[1:])
    return np.diff(total[ranges_D])


def ratio(part_D: np.ndarray, whole_D: np.ndarray) -> np.ndarray:
    """float32 [D]: part / whole, 0 where there is nothing."""
    return np.where(whole_D > 0, part_D / np.maximum(whole_D, 1), 0).astype(np.float32)


def one_of(codes: np.ndarray, chars: str) -> np.ndarray:
    """bool: which code points are among these characters (all below U+FFFF)."""
    return _members(chars)[np.minimum(codes, 0xFFFF)]


@lru_cache(maxsize=32)
def _members(chars: str) -> np.ndarray:
    out = np.zeros(0x10000, np.bool_)
    out[[ord(c) for c in chars]] = True
    return out
