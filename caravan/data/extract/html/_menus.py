"""Menus before or behind the content: runs of short lines, whatever their elements are called."""

from __future__ import annotations

import re

RUN = 5
"""Short lines in a row that make a menu."""
_SHORT = 6
_LONG = 12
_END = re.compile(r"[.!?。！？।:;,]['\"”’)]*$")
WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]|[^\W\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]+")


def trimmed(text: str) -> str:
    """The text without the menu before its first paragraph and the one behind its last.

    A menu is a run of five or more lines of at most six words that end in no mark; the line right before the
    first paragraph may be its heading and stays. A text without a paragraph of twelve words (a poem, a list)
    stays as it is.
    """
    lines = text.split("\n")
    said = [i for i, line in enumerate(lines) if line.strip()]
    counts = {i: len(WORDS.findall(lines[i][:400])) for i in said}
    long = [i for i in said if counts[i] >= _LONG]
    if not long:
        return text
    before = [i for i in said if i < long[0]]
    behind = [i for i in said if i > long[-1]]
    start, stop = 0, len(lines)
    at = len(before) - 1  # the heading
    while at > 0 and not _is_short(lines[before[at - 1]], counts[before[at - 1]]):
        at -= 1
    if at >= RUN and all(_is_short(lines[i], counts[i]) for i in before[at - RUN : at]):
        start = before[at]
    for at in range(len(behind) - RUN + 1):
        if all(_is_short(lines[i], counts[i]) for i in behind[at : at + RUN]):
            stop = behind[at]
            break
    return "\n".join(lines[start:stop])


def _is_short(line: str, words: int) -> bool:
    return words <= _SHORT and not _END.search(line.rstrip())
