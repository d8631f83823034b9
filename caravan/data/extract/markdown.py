"""Markdown as text: front matter and comments go, code fences stay to the letter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
FRONT_LINES = 200
"""Front matter longer than this is none: the lines were a rule (---) and text."""


def lines(given: Iterable[str]) -> Iterator[str]:
    """The lines of a Markdown file (with their ends) without YAML or TOML front matter and HTML comments."""
    given = iter(given)
    fence = ""
    commented = False
    for line in _behind_front_matter(given):
        opens = _FENCE.match(line)
        if fence:
            fence = "" if opens and opens[1].startswith(fence) and not line.strip().strip(fence[0]) else fence
            yield line
            continue
        if opens and not commented:
            fence = opens[1]
            yield line
            continue
        kept, commented = _uncommented(line, commented)
        if kept.strip() or not line.strip():
            yield kept


def _uncommented(line: str, commented: bool) -> tuple[str, bool]:
    if not commented and "<!--" not in line:
        return line, False
    kept = []
    while line:
        mark = "-->" if commented else "<!--"
        said, found, line = line.partition(mark)
        if not commented:
            kept.append(said)
        if not found:
            break
        commented = not commented
    return "".join(kept), commented


def _behind_front_matter(given: Iterator[str]) -> Iterator[str]:
    first = next(given, None)
    if first is None:
        return
    rule = first.rstrip()
    if rule not in ("---", "+++"):
        yield first
    else:
        held = [first]
        for line in given:
            held.append(line)
            if line.rstrip() == rule or (rule == "---" and line.rstrip() == "..."):
                held = [] if any((":" if rule == "---" else "=") in x for x in held[1:-1]) else held
                break
            if len(held) > FRONT_LINES:
                break
        yield from held
    yield from given
