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
    before = _until_long(lines, range(len(lines)))
    if len(before) == len(lines):
        return text
    behind = _until_long(lines, range(len(lines) - 1, len(before), -1))[::-1]
    before, behind = [i for i in before if lines[i].strip()], [i for i in behind if lines[i].strip()]
    start, stop = 0, len(lines)
    at = len(before) - 1  # the heading
    while at > 0 and not _is_short(lines[before[at - 1]]):
        at -= 1
    if at >= RUN and all(_is_short(lines[i]) for i in before[at - RUN : at]):
        start = before[at]
    for at in range(len(behind) - RUN + 1):
        if all(_is_short(lines[i]) for i in behind[at : at + RUN]):
            stop = behind[at]
            break
    return "\n".join(lines[start:stop])


def _until_long(lines: list[str], order: range) -> list[int]:
    """Numbers of the lines before the first paragraph in this order."""
    found = []
    for i in order:
        if len(lines[i]) >= _LONG and _words(lines[i]) >= _LONG:
            break
        found.append(i)
    return found


def _words(line: str) -> int:
    return len(WORDS.findall(line[:400]))


def _is_short(line: str) -> bool:
    return not _END.search(line.rstrip()) and _words(line) <= _SHORT
