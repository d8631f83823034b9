"""Source code and markup in a text: tags, entities, and lines that look like a program.

A line looks like a program if it ends in one of ; { } or ends in a colon after a closing bracket, or if at
least a fifth of its characters are symbols that prose seldom has. Ours; for telling pages of code or broken
extraction from prose, not for naming a language.
"""

from __future__ import annotations

import re

import numpy as np

from caravan.data.signals._view import SPACE, View, ratio

VERSION = 1
COLUMNS = {
    "code_lines": "share of lines that look like a program",
    "symbol_share": "characters prose seldom has ({}[]()<>=+*/\\|&^%$#@;_~`) among all but white space",
    "markup_share": "characters inside tags <...> and entities &...; over all characters",
}
_MARKUP = re.compile(r"<[/!?]?[A-Za-z][^<>\n]{0,300}>|&(?:[a-zA-Z]{2,8}|#\d{1,6}|#x[0-9a-fA-F]{1,6});")
_SYMBOL = np.zeros(128, np.bool_)
_SYMBOL[[ord(c) for c in "{}[]()<>=+*/\\|&^%$#@;_~`"]] = True


def signals(view: View) -> dict[str, np.ndarray]:
    codes = view.codes_N
    symbols = np.flatnonzero(_SYMBOL[np.minimum(codes, 127)] & (codes != 127))
    start, end = view.line_start_L, view.line_end_L
    dense = 5 * (np.searchsorted(symbols, end) - np.searchsorted(symbols, start)) >= end - start
    last, before = view.last_code_L(), view.last_code_L(1)
    ended = (last == 59) | (last == 123) | (last == 125) | ((last == 58) & ((before == 41) | (before == 93)))
    solid = view.chars_D - view.count(SPACE)
    markup = np.fromiter(map(_markup, view.texts), np.int64, len(view))
    return {
        "code_lines": ratio(view.sum_lines(ended | dense), view.lines_D),
        "symbol_share": ratio(view.inside(symbols), solid),
        "markup_share": ratio(markup, view.chars_D),
    }


def _markup(text: str) -> int:
    if "<" not in text and "&" not in text:
        return 0
    return sum(len(found) for found in _MARKUP.findall(text))
