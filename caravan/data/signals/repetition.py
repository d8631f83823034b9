"""Gopher's repetition signals (Rae et al. 2021, table A1), in RedPajama-v2's reading of its words.

Lines and paragraphs: later copies, and their characters over all characters of the text. Most frequent
n-gram (n = 2, 3, 4): the one seen most often, the first of equals; its letters times its count over the
letters of all words; 0 if it occurs once. Repeated n-grams (n = 5 to 10): letters of every word inside an
n-gram that occurs twice or more, first copies too, each word once.

An n-gram can only be repeated where both of its (n-1)-grams are, so after the first sort hardly anything is
left to look at. Legend: V words with letters, C places where an n-gram that occurs again begins, R distinct
n-grams.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from caravan.data.signals._view import View, ratio, sums

VERSION = 1
_TOP = (2, 3, 4)
_REPEATED = (5, 6, 7, 8, 9, 10)
COLUMNS = {
    "copied_lines": "share of lines that are later copies",
    "copied_paragraphs": "share of paragraphs that are later copies",
    "copied_line_chars": "characters of copied lines among all",
    "copied_paragraph_chars": "characters of copied paragraphs among all",
    **{f"top_{n}gram": f"letters of the most frequent {n}-gram among all letters" for n in _TOP},
    **{f"repeated_{n}grams": f"letters inside repeated {n}-grams among all letters" for n in _REPEATED},
}


def signals(view: View) -> dict[str, np.ndarray]:
    copied = view.copied_lines
    out = {
        "copied_lines": ratio(copied[:, 0], view.lines_D),
        "copied_paragraphs": ratio(copied[:, 2], view.paragraphs_D),
        "copied_line_chars": ratio(copied[:, 1], view.chars_D),
        "copied_paragraph_chars": ratio(copied[:, 3], view.chars_D),
    }
    total = view.sum_plain(view.letters_V)
    grams = _pairs(view)
    for n in range(2, _REPEATED[-1] + 1):
        if n > 2:
            grams = follow(grams, 1)
        if n in _TOP:
            most = most_frequent(grams, n, view.document_V, view.letter_range_V, len(view))
            out[f"top_{n}gram"] = ratio(most, total)
        elif n in _REPEATED:
            inside = covered(grams, n, view.letters_V, view.plain_range_D)
            out[f"repeated_{n}grams"] = ratio(inside, total)
    return out


@dataclass(frozen=True, slots=True)
class Grams:
    """n-grams that occur twice or more in one document."""

    place_C: np.ndarray
    """int64, ascending: word at which each occurrence begins."""
    name_C: np.ndarray
    """int64: which n-gram it is, 0 to R - 1."""
    count_R: np.ndarray
    """int64: how often each occurs."""


def _pairs(view: View) -> Grams:
    word, document = view.hash_V, view.document_V
    if len(word) < 2:
        none = np.zeros(0, np.int64)
        return Grams(none, none, none)
    with np.errstate(over="ignore"):
        key = (word[:-1] ^ (document[:-1].astype(np.uint64) << np.uint64(40))) * np.uint64(0xFF51AFD7ED558CCD)
        key = (key ^ (key >> np.uint64(32)) ^ word[1:]) * np.uint64(0x9E3779B97F4A7C15)
    place = np.flatnonzero(document[1:] == document[:-1])
    return repeated(place, key[place])


def repeated(place: np.ndarray, key: np.ndarray) -> Grams:
    """What occurs twice or more. `place` int64, ascending; `key` uint64, well mixed, one per place."""
    # Most keys fall into a bucket of their own and need no sorting. Two tables of different bits leave few
    # more than those that do repeat.
    size = max(10, (2 * len(key)).bit_length())
    for shift in (64 - size, 0):
        bucket = ((key >> np.uint64(shift)) & np.uint64((1 << size) - 1)).astype(np.int64)
        crowded = np.flatnonzero(np.bincount(bucket, minlength=1 << size)[bucket] > 1)
        place, key = place[crowded], key[crowded]
    return _numbered(place, key)


def follow(grams: Grams, shift: int) -> Grams:
    """Longer n-grams from n-grams: an occurrence at i, and one at i + shift (at most n)."""
    place = grams.place_C
    if shift == 1:
        left = np.flatnonzero(place[1:] == place[:-1] + 1)
        right = left + 1
    else:
        at = np.searchsorted(place, place + shift)
        left = np.flatnonzero(place[np.minimum(at, len(place) - 1)] == place + shift) if len(place) else at
        right = at[left]
    key = grams.name_C[left] * max(1, len(grams.count_R)) + grams.name_C[right]
    return _numbered(place[left], key)


def _numbered(place: np.ndarray, key: np.ndarray) -> Grams:
    """Keep what occurs twice; number the distinct ones."""
    order = np.argsort(key)
    ordered = key[order]
    new = np.ones(len(key), np.bool_)
    new[1:] = ordered[1:] != ordered[:-1]
    run = np.cumsum(new) - 1
    count = np.bincount(run) if len(run) else np.zeros(0, np.int64)
    name = np.empty(len(key), np.int64)
    name[order] = run
    again = count > 1
    kept = again[name] if len(key) else np.zeros(0, np.bool_)
    renumbered = np.cumsum(again) - 1
    return Grams(place[kept], renumbered[name[kept]], count[again])


def most_frequent(
    grams: Grams, n: int, document_V: np.ndarray, letter_range_V: np.ndarray, documents: int
) -> np.ndarray:
    """int64 [D]: letters x count of the most frequent n-gram; the first of equals, as a counter gives it."""
    best, out = np.zeros(documents, np.int64), np.zeros(documents, np.int64)
    if not len(grams.count_R):
        return out
    first_R = np.full(len(grams.count_R), np.iinfo(np.int64).max)
    np.minimum.at(first_R, grams.name_C, grams.place_C)
    document_R = document_V[first_R]
    rank_R = (grams.count_R << 32) - first_R
    np.maximum.at(best, document_R, rank_R)
    won = np.flatnonzero(rank_R == best[document_R])
    start = first_R[won]
    letters = letter_range_V[start + n] - letter_range_V[start]
    out[document_R[won]] = letters * grams.count_R[won]
    return out


def covered(grams: Grams, n: int, letters_V: np.ndarray, ranges_D: np.ndarray) -> np.ndarray:
    """int64 [D]: letters of words inside the n-grams, each word once."""
    if not len(grams.place_C):
        return np.zeros(len(ranges_D) - 1, np.int64)
    size = len(letters_V) + 1
    edge = np.bincount(grams.place_C, minlength=size) - np.bincount(grams.place_C + n, minlength=size)
    inside = np.cumsum(edge[:-1]) > 0
    return sums(letters_V * inside, ranges_D)
