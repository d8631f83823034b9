"""C4's line filter and page rules (Raffel et al. 2020), as its paper states them and as its code does.

The signals say what the line filter would leave; `caravan filter` applies it. Most pages hold nothing
unusual and are judged by arrays; those that do (a citation, a brace, javascript, cookies) go line by line.
"""

from __future__ import annotations

import numpy as np

from caravan.data import lines
from caravan.data.signals._view import View, one_of, ratio

VERSION = 1
COLUMNS = {
    "c4_kept_lines": "share of lines C4's line filter keeps, as the paper has it (3 words, . ? ! \" ')",
    "c4_sentences": "sentences in those",
    "c4_lorem": "lines with lorem ipsum that are not dropped before",
    "c4_braces": "lines with { that are not dropped before",
    "c4_code_kept_lines": 'share of lines as the code has it (5 words, . ? ! ")',
    "c4_code_sentences": "sentences in those",
    "c4_code_lorem": "lines with lorem ipsum among them",
    "c4_code_braces": "lines with { among them",
    "c4_any_end_sentences": "sentences in lines of 3 words whatever they end in (FineWeb)",
    "c4_any_end_lorem": "lines with lorem ipsum among them",
    "c4_any_end_braces": "lines with { among them",
}
_PHRASES = (
    b"lorem ipsum",
    b"javascript",
    *(p.encode() for p in lines.POLICY if "cookie" not in p),
    b"cookie",
)
"""Every phrase of the filter holds one of these."""


def signals(view: View) -> dict[str, np.ndarray]:
    unusual = _unusual(view)
    ends = _sentence_ends(view)
    total = np.concatenate([[0], np.cumsum(ends)])
    ended_L = total[view.line_last_L] - total[view.line_first_L]
    sentences_L = np.maximum(ended_L, 1)
    paper = _judged(view, unusual, sentences_L, lines.C4_PAPER)
    code = _judged(view, unusual, sentences_L, lines.C4_CODE)
    any_end = _judged(view, unusual, sentences_L, lines.C4_ANY_END)
    return {
        "c4_kept_lines": ratio(paper[:, 0], view.lines_D),
        "c4_sentences": paper[:, 1],
        "c4_lorem": paper[:, 2],
        "c4_braces": paper[:, 3],
        "c4_code_kept_lines": ratio(code[:, 0], view.lines_D),
        "c4_code_sentences": code[:, 1],
        "c4_code_lorem": code[:, 2],
        "c4_code_braces": code[:, 3],
        "c4_any_end_sentences": any_end[:, 1],
        "c4_any_end_lorem": any_end[:, 2],
        "c4_any_end_braces": any_end[:, 3],
    }


def _unusual(view: View) -> np.ndarray:
    """int64, ascending: lines that only the slow reference can judge."""
    places = [np.flatnonzero((view.codes_N == ord("{")) | (view.codes_N == ord("[")))]
    places += [view.finds(phrase) for phrase in _PHRASES]
    size = view.word_end_W - view.word_start_W
    if size.size and size.max() > lines.LONG_WORD:
        places.append(view.word_start_W[size > lines.LONG_WORD])
    found = np.searchsorted(view.line_start_L, np.concatenate(places), side="right") - 1
    return np.unique(found)


def _judged(view: View, unusual: np.ndarray, sentences_L: np.ndarray, rules: lines.C4) -> np.ndarray:
    """int64 [D, 4]: lines kept, sentences, lorem, braces."""
    kept = view.line_last_L - view.line_first_L >= rules.min_words
    if rules.end_marks is not None:
        last = view.last_code_L()
        dots = (last == 46) & (view.last_code_L(1) == 46) & (view.last_code_L(2) == 46)
        kept &= one_of(last, rules.end_marks) & ~dots
    kept[unusual] = False
    out = np.zeros((len(view), 4), np.int64)
    out[:, 0] = view.sum_lines(kept)
    out[:, 1] = view.sum_lines(sentences_L * kept)
    document = np.searchsorted(view.end_D, view.line_start_L[unusual])
    start = view.line_start_L[unusual] - view.start_D[document]
    end = view.line_end_L[unusual] - view.start_D[document]
    for d, i, j in zip(document.tolist(), start.tolist(), end.tolist(), strict=True):
        sifted = lines.c4(view.texts[d][i:j], rules)
        out[d] += len(sifted.lines), sifted.sentences, sifted.lorem, sifted.braces
    return out


def _sentence_ends(view: View) -> np.ndarray:
    """bool [W]: words that end a sentence; `lines.sentences` says the same more slowly."""
    codes, start = view.codes_N, view.word_start_W
    at = view.word_end_W - 1
    last = codes[at]
    for _ in range(3):
        closing = np.flatnonzero(_closes(last) & (at > start))
        if not len(closing):
            break
        at = at.copy()
        at[closing] -= 1
        last[closing] = codes[at[closing]]
    ends = (last == 46) | (last == 33) | (last == 63)
    initial = np.flatnonzero(ends & (view.word_end_W - start == 2) & (at - start == 1) & (last == 46))
    first = codes[start[initial]]
    ends[initial[(first >= 65) & (first <= 90)]] = False
    return ends


def _closes(code: np.ndarray) -> np.ndarray:
    """bool: closing quotes and brackets."""
    out = (code == 34) | (code == 39) | (code == 41) | (code == 93)
    return out | (code == 0x201D) | (code == 0x2019)
