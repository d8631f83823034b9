"""Cleaning one text, and the rules that turn a text down.

Repetition: Rae et al. 2021 (Gopher), table A1. Of repeated n-grams, later copies alone are counted, each word
once, over the sum of word lengths (first copies too, as RedPajama-v2 has it, turns down technical lists). The
most frequent n-gram counts if it occurs twice. The limits were found on web pages, so a longer text is judged
page by page. Left out: the rules that suit English web pages alone (stop words, end marks), and all of them
for source code. For scripts written without spaces only whole lines are compared.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ufeff\ufffe\uffff]")
_SPACE_AT_END = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANK = re.compile(r"\n{4,}")
WORD = re.compile(r"\w+")

TOP = {2: 0.20, 3: 0.18, 4: 0.16}
"""Share of characters that the most frequent n-gram may cover."""
REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Share of characters inside n-grams that came before."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """Which rule turned a text down, and the number that did it."""

    rule: str
    reason: str
    kept: str = ""
    """Of a copy: the id of the text that stays in its place."""


def normalise(text: str) -> str:
    """One kind of line end, no control characters but tab and newline, no space at line ends, two blank lines
    at most. Letters stay as they are: no Unicode normal form is imposed."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\x85", "\n")
    text = _CONTROL.sub("", text)
    text = _SPACE_AT_END.sub("", text)
    return _BLANK.sub("\n\n\n", text).strip("\n")


_SCRIPTS = {
    "CJK": "zh", "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko", "CYRILLIC": "cyrillic",
    "ARABIC": "arabic", "DEVANAGARI": "devanagari", "GREEK": "greek", "HEBREW": "hebrew", "THAI": "thai",
}  # fmt: skip
_ENGLISH = frozenset(
    (
        "the",
        "be",
        "to",
        "of",
        "and",
        "that",
        "have",
        "with",
        "is",
        "in",
        "it",
        "for",
        "a",
        "you",
        "are",
        "not",
        "or",
    )
)
UNSPACED = frozenset(("zh", "ja", "thai"))


def language(text: str, sample_chars: int = 4000) -> str:
    """A label from the script: zh, ja, ko, cyrillic, …, en (Latin with English little words), latin, none."""
    head = text[:sample_chars]
    counts: Counter[str] = Counter()
    for char, n in Counter(head).items():
        if char.isascii():
            counts["latin"] += n if char.isalpha() else 0
        elif char.isalpha():
            counts[_script(char)] += n
    letters = sum(counts.values())
    if not letters:
        return "none"
    if counts["ja"] > 0.1 * letters:
        return "ja"
    if counts["zh"] > 0.2 * letters:  # a Han character says as much as several letters
        return "zh"
    best = max(sorted(counts), key=lambda s: counts[s])
    if best != "latin":
        return best
    words = WORD.findall(head.lower())
    return "en" if sum(w in _ENGLISH for w in words) >= 0.1 * len(words) else "latin"


def _script(char: str) -> str:
    name = unicodedata.name(char, "")
    return next((label for start, label in _SCRIPTS.items() if name.startswith(start)), "latin")


def repetition(text: str, words: Sequence[str], hashes_n: np.ndarray, lang: str) -> Rejection | None:
    """The first rule of repetition that the text breaks. `hashes_n` uint64, one per word."""
    if lang == "code":
        return None
    return _lines(text) or (None if lang in UNSPACED else _pages(words, hashes_n))


def _pages(words: Sequence[str], hashes_n: np.ndarray, page: int = 2000) -> Rejection | None:
    """A text breaks the n-gram rules if most of its pages of about 2,000 words do."""
    count = max(1, round(len(words) / page))
    edges = [len(words) * k // count for k in range(count + 1)]
    found = [_ngrams(words[a:b], hashes_n[a:b]) for a, b in pairwise(edges)]
    broken = [rejection for rejection in found if rejection]
    return broken[0] if 2 * len(broken) > count else None


def _lines(text: str, least: int = 8) -> Rejection | None:
    for name, parts in (
        ("line", [s for s in text.split("\n") if s.strip()]),
        ("paragraph", [s for s in re.split(r"\n\s*\n", text) if s.strip()]),
    ):
        if len(parts) < least:  # in a few lines one refrain is nothing odd
            continue
        again = len(parts) - len(set(parts))
        if again > 0.30 * len(parts):
            return Rejection(
                "repeated_lines", f"{again / len(parts):.0%} of its {name}s are copies (limit 30%)"
            )
        chars = sum(map(len, parts))
        copied = chars - sum(map(len, set(parts)))
        if copied > 0.20 * chars:
            return Rejection("repeated_lines", f"{copied / chars:.0%} of it is copies of {name}s (limit 20%)")
    return None


def _ngrams(words: Sequence[str], hashes_n: np.ndarray, least: int = 50) -> Rejection | None:
    if len(words) < least:
        return None
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    total = int(lengths.sum())
    ends = np.concatenate([[0], np.cumsum(lengths)])
    grams = hashes_n
    for n in range(2, 11):
        grams = fold(grams[: len(hashes_n) - n + 1], hashes_n[n - 1 :])
        if not len(grams):
            break
        _, first, place, counts = np.unique(grams, return_index=True, return_inverse=True, return_counts=True)
        if counts.max() < 2:
            break  # no repeated n-gram, hence no longer one either
        if n in TOP:
            many = counts > 1
            covered = int(((ends[first + n] - ends[first]) * counts)[many].max())
            if covered > TOP[n] * total:
                return Rejection(
                    "repeated_ngrams", f"one {n}-gram covers {covered / total:.0%} (limit {TOP[n]:.0%})"
                )
        elif n in REPEATED:
            starts = np.flatnonzero(first[place] != np.arange(len(grams)))
            edge = np.zeros(len(words) + 1, np.int64)
            np.add.at(edge, starts, 1)
            np.add.at(edge, starts + n, -1)
            covered = int(lengths[np.cumsum(edge[:-1]) > 0].sum())
            if covered > REPEATED[n] * total:
                limit = f"{REPEATED[n]:.0%}"
                return Rejection(
                    "repeated_ngrams", f"repeated {n}-grams cover {covered / total:.0%} (limit {limit})"
                )
    return None


def fold(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """uint64 hash of a hash and one more unit."""
    with np.errstate(over="ignore"):
        mixed = (a ^ b) * np.uint64(0xFF51AFD7ED558CCD)
        return (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
