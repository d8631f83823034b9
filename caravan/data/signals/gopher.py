"""Gopher's quality signals (Rae et al. 2021, appendix A.1.1).

Words are runs without white space: a splitter that makes words of punctuation lets the rule on alphabetic
words turn down good prose. Stop words are compared with their case ("The" is no hit), without punctuation
("that," is one), and distinct ones are counted, which is the stricter reading of "at least two of".
"""

from __future__ import annotations

import numpy as np

from caravan.data.signals._view import OTHER, View, ratio

VERSION = 1
COLUMNS = {
    "gopher_words": "words with at least one character that is neither punctuation nor symbol",
    "gopher_mean_word_length": "their mean length without punctuation (characters)",
    "gopher_hash_ratio": "# per word",
    "gopher_ellipsis_ratio": "... and … per word",
    "gopher_bullet_lines": "share of lines that start with a bullet (• or -)",
    "gopher_ellipsis_lines": "share of lines that end in ... or …",
    "gopher_alpha_words": "share of all words with at least one letter",
    "gopher_stop_words": "how many of the, be, to, of, and, that, have, with occur (0 to 8)",
}
_STOP = ("the", "be", "to", "of", "and", "that", "have", "with")
_STOP_KEYS = np.array([sum(ord(c) << (16 * k) for k, c in enumerate(w)) for w in _STOP], np.uint64)


def signals(view: View) -> dict[str, np.ndarray]:
    plain = np.diff(view.plain_range_D)
    first = view.codes_N[view.line_start_L]
    ellipses = view.occurrences(0x2026) + view.inside(view.finds(b"..."))
    return {
        "gopher_words": plain,
        "gopher_mean_word_length": ratio(view.sum_plain(view.letters_V), plain),
        "gopher_hash_ratio": ratio(view.occurrences(ord("#")), plain),
        "gopher_ellipsis_ratio": ratio(ellipses, plain),
        "gopher_bullet_lines": ratio(view.sum_lines((first == 0x2022) | (first == 45)), view.lines_D),
        "gopher_ellipsis_lines": ratio(view.sum_lines(view.ellipsis_L), view.lines_D),
        "gopher_alpha_words": ratio(view.sum_words(_with_letter(view)), view.words_D),
        "gopher_stop_words": _stop_words(view),
    }


def _with_letter(view: View) -> np.ndarray:
    """bool [W]: words with a letter. Other characters are rare, so they are what is counted."""
    others = view.places(OTHER)
    at = np.searchsorted(view.word_start_W, others, side="right") - 1
    return view.letters_W > np.bincount(at, minlength=len(view.word_start_W))


def _stop_words(view: View) -> np.ndarray:
    """int64 [D]: distinct stop words."""
    which, key = view.short_words("tboahw")
    found = np.zeros(len(view), np.int64)
    for stop in _STOP_KEYS:
        hits = which[key == stop]
        found += np.searchsorted(hits, view.plain_range_D[1:]) > np.searchsorted(
            hits, view.plain_range_D[:-1]
        )
    return found
