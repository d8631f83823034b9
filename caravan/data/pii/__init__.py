"""Personal data and secrets in text: found by pattern and, wherever there is one, by checksum.

One file per kind of span; the folder is the registry. A file has a one-line docstring and

    LABEL     what stands in its place: [EMAIL]
    PRIORITY  where kinds overlap, the smaller number wins (a checksum is surer than a shape)
    VERSION   raised when the same text should give other spans
    HINT      an expression of RE2 that is found in every text in which `find` finds something: a scan of all
              texts at once, which never goes back, so that prose costs little
    find      find(text) -> (start, stop) of every span, in characters

All patterns are bounded and anchored, so that time is linear in the text. Left out: names of persons. Without
a model they are a list of given names, and half of such a list are words; a rule that is wrong half the time
is worse than none.

`replace` puts a typed placeholder in place of a span, `pseudonym` one that also tells values apart: equal
values get equal placeholders in every document and every run with one salt, which a keyed hash keeps from
being guessed back."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType

from caravan.types import UserError

SPACE = r"[\s\v\x1c-\x1f\x{85}\p{Z}]"
"""In RE2, all that Python's `\\s` stands for."""
ACTIONS = ("replace", "pseudonym", "drop")
_WIDE = "[０-９]{4}|＠"
_NARROW = {code: code - 0xFEE0 for code in map(ord, "＠．－＋（）＿")} | {
    code: code - 0xFEE0
    for first, last in ("０９", "ＡＺ", "ａｚ")
    for code in range(ord(first), ord(last) + 1)
}


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, stop) of a text are of a kind."""

    kind: str
    start: int
    stop: int


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """Kinds there are, surest first."""
    there = [p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_")]
    return tuple(sorted(there, key=lambda name: (load(name).PRIORITY, name)))


@cache
def load(name: str) -> ModuleType:
    """One kind."""
    return importlib.import_module(f"caravan.data.pii.{name}")


def chosen(kinds: Sequence[str]) -> tuple[str, ...]:
    """`auto` means all. Raises UserError for a kind that does not exist."""
    if tuple(kinds) == ("auto",):
        return names()
    for kind in kinds:
        if kind not in names():
            raise UserError(f"there is no kind of span `{kind}`", f"there are: {', '.join(names())}")
    return tuple(n for n in names() if n in kinds)


def find(text: str, kinds: Sequence[str] = ("auto",)) -> list[Span]:
    """Spans in order of place; they do not overlap."""
    return find_all([text], kinds)[0]


def find_all(texts: Sequence[str], kinds: Sequence[str] = ("auto",)) -> list[list[Span]]:
    """The spans of every text, as `find` gives them. Digits, letters and signs of full width, as Chinese and
    Japanese keyboards write them, count as what they stand for."""
    texts = _narrow(texts)
    taken: list[list[Span]] = [[] for _ in texts]
    wanted = chosen(kinds)
    maybe = hinted(texts, "|".join(load(kind).HINT for kind in wanted))
    for kind in wanted:
        module = load(kind)
        for i in (maybe[k] for k in hinted([texts[i] for i in maybe], module.HINT)):
            for start, stop in module.find(texts[i]):
                if not any(start < other.stop and other.start < stop for other in taken[i]):
                    taken[i].append(Span(kind, start, stop))
    return [sorted(spans, key=lambda span: span.start) for spans in taken]


def _narrow(texts: Sequence[str]) -> Sequence[str]:
    """Character for character, so that places stay."""
    wide = [i for i, text in enumerate(texts) if not text.isascii()]
    found = [wide[k] for k in hinted([texts[i] for i in wide], _WIDE)] if wide else []
    if not found:
        return texts
    out = list(texts)
    for i in found:
        out[i] = out[i].translate(_NARROW)
    return out


def hinted(texts: Sequence[str], hint: str) -> list[int]:
    """Which texts hold what an RE2 expression describes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        rows = pa.array(texts, pa.large_string())
    except UnicodeEncodeError:  # lone surrogates, which no expression asks for
        rows = pa.array([t.encode("utf-8", "replace").decode() for t in texts], pa.large_string())
    return pc.indices_nonzero(pc.match_substring_regex(rows, hint)).to_pylist()


def found_at(starts: re.Pattern[str], pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """What `pattern.finditer(text)` finds, if every match begins where `starts` matches: far quicker where
    `starts` begins with a set of characters that prose seldom has."""
    end = 0
    for start in starts.finditer(text):
        if start.start() >= end and (found := pattern.match(text, start.start())):
            end = found.end()
            yield found


def placeholder(salt: str | None = None) -> Callable[[str, str], str]:
    """(kind, value) -> what stands in its place; with a salt, another for every value."""

    def plain(kind: str, value: str) -> str:
        return f"[{load(kind).LABEL}]"

    def stable(kind: str, value: str) -> str:
        same = "".join(value.split()).translate(_NARROW).casefold()
        code = hashlib.blake2b(same.encode("utf-8", "replace"), key=key, digest_size=4).hexdigest()
        return f"[{load(kind).LABEL}_{code}]"

    if salt is None:
        return plain
    key = hashlib.blake2b(salt.encode()).digest()
    return stable


def replaced(text: str, spans: Sequence[Span], put: Callable[[str, str], str]) -> str:
    """The text with placeholders."""
    parts, at = [], 0
    for span in spans:
        parts += [text[at : span.start], put(span.kind, text[span.start : span.stop])]
        at = span.stop
    return "".join([*parts, text[at:]])
