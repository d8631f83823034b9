"""Line filters: which lines of a text stay. They edit a text; every other rule keeps or drops it whole.

C4 (Raffel et al. 2020, section 2.2, and its code, which disagrees: five words and three sentences instead
of three and five). Per line: drop it if a word is longer than 1,000 characters; strip [12], [edit],
[citation needed]; drop it unless it ends in an end mark, if it ends in "...", if it has too few words;
"lorem ipsum" or "{" in a line that came so far condemns the page; drop it if it speaks of javascript or of
policies and cookies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from caravan.types import UserError

CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
POLICY = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
LONG_WORD = 1000
_SENTENCE_END = re.compile("[.!?][\"')\\]”’]{0,3}$")
_INITIAL = re.compile(r"^[A-Z]\.$")


@dataclass(frozen=True, slots=True)
class C4:
    """The two readings of C4's line filter."""

    min_words: int
    end_marks: str | None
    """None keeps lines whatever they end in (FineWeb left this rule out)."""


C4_PAPER = C4(3, ".?!\"'")
C4_CODE = C4(5, '.?!"')
C4_ANY_END = C4(3, None)


@dataclass(slots=True)
class Sifted:
    """What C4's line filter leaves of a page, and what it met on the way."""

    lines: list[str]
    sentences: int = 0
    lorem: int = 0
    """Lines with "lorem ipsum" that had not been dropped before."""
    braces: int = 0
    """Lines with "{" that had not been dropped before."""


def c4(text: str, rules: C4) -> Sifted:
    """C4's line filter, one line after another: the slow reference of `signals.c4`, and the filter itself.

    A page with "lorem ipsum" or "{" is judged by its counts; its lines are filtered all the same.
    """
    kept: list[str] = []
    out = Sifted(kept)
    for raw in text.split("\n"):
        words = raw.split()
        if not words or max(map(len, words)) > LONG_WORD:
            continue
        line = CITATION.sub("", raw.strip()) if "[" in raw else raw.strip()
        if rules.end_marks is not None and (
            not line.endswith(tuple(rules.end_marks)) or line.endswith("...")
        ):
            continue
        if len(words) < rules.min_words:
            continue
        low = line.lower()
        out.lorem += "lorem ipsum" in low
        if "javascript" in low:
            continue
        out.braces += "{" in line
        if any(phrase in low for phrase in POLICY):
            continue
        out.sentences += sentences(line.split())
        kept.append(line)
    return out


def sentences(words: Iterable[str]) -> int:
    """Sentences of one line, at least one: words that end in . ! ? (closing quotes and brackets aside),
    initials ("J.") left out. The published code asks NLTK's punkt, which knows abbreviations too."""
    return max(1, sum(1 for w in words if _SENTENCE_END.search(w) and not _INITIAL.match(w)))


def edit(text: str, name: str) -> str:
    """The text with only the lines that a filter keeps: c4_paper, c4_code, c4_any_end or refinedweb.

    C4's filters strip their lines; RefinedWeb's leaves the others as they were. Raises UserError for
    another name.
    """
    if name in _C4:
        return "\n".join(c4(text, _C4[name]).lines)
    if name != "refinedweb":
        raise UserError(f"there is no line filter `{name}`", f"there are: {', '.join([*_C4, 'refinedweb'])}")
    from caravan.data.signals import View, refinedweb

    view = View([text])
    gone = set(view.line_start_L[refinedweb.flagged_lines(view)].tolist())
    if not gone:
        return text
    kept, at = [], 0
    for line in text.split("\n"):
        start = at + len(line) - len(line.lstrip())
        at += len(line) + 1
        if start not in gone:
            kept.append(line)
    return "\n".join(kept).strip("\n")


_C4 = {"c4_paper": C4_PAPER, "c4_code": C4_CODE, "c4_any_end": C4_ANY_END}
