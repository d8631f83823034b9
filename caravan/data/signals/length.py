"""Size of a document: characters, bytes, words, lines, and what kinds of characters it is made of."""

from __future__ import annotations

import numpy as np

from caravan.data.signals._view import ALPHA, DIGIT, HAN, MARK, SPACE, UPPER, View, ratio

VERSION = 1
COLUMNS = {
    "chars": "characters",
    "bytes": "bytes in UTF-8",
    "words": "runs of characters without white space",
    "lines": "lines that are not blank",
    "alpha_share": "letters among characters that are no white space",
    "digit_share": "digits among them",
    "mark_share": "punctuation and symbols among them",
    "upper_share": "upper case among letters",
    "han_share": "Han characters among letters",
}


def signals(view: View) -> dict[str, np.ndarray]:
    solid = view.chars_D - view.count(SPACE)
    letters = view.count(ALPHA)
    size = (len(text.encode("utf-8", "surrogatepass")) for text in view.texts)
    return {
        "chars": view.chars_D,
        "bytes": np.fromiter(size, np.int64, len(view)),
        "words": view.words_D,
        "lines": view.lines_D,
        "alpha_share": ratio(letters, solid),
        "digit_share": ratio(view.count(DIGIT), solid),
        "mark_share": ratio(view.count(MARK), solid),
        "upper_share": ratio(view.count(UPPER), letters),
        "han_share": ratio(view.count(HAN), letters),
    }
