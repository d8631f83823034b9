"""One-line facts about Python's own functions: a name, and what its documentation says it does, in one
sentence.

The quickstart teaches these and asks for them. A fact must therefore be short (a small model learns it word
for word), plain ASCII, and belong to one name only. What we leave out: signatures, examples, second
sentences, and every function whose first sentence is long or shared with another (os.path.islink, say, on
some versions).
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

SUMMARY_CHARS = (16, 90)
"""Shortest and longest summary that is taught."""

MODULES: tuple[str, ...] = (
    "textwrap", "os.path", "math", "itertools", "json", "random", "re", "statistics", "shutil", "bisect",
    "heapq", "calendar", "fnmatch", "glob", "functools", "copy", "collections", "string", "html",
    "tempfile", "time", "secrets", "operator", "difflib", "shlex", "urllib.parse", "keyword", "linecache",
    "struct", "zlib",
)  # fmt: skip
"""Taught in this order; a summary already taken by an earlier module is not taught twice."""

TYPES: tuple[type, ...] = (str, list, dict, set, int, float)
"""Not bytes: its sentences differ from those of str by a letter, and a wrong one would look right."""

BUILTINS: tuple[str, ...] = (
    "abs", "all", "any", "ascii", "bin", "callable", "chr", "divmod", "eval", "format", "getattr",
    "hasattr", "hash", "hex", "id", "input", "isinstance", "issubclass", "iter", "len", "max", "min",
    "next", "oct", "open", "ord", "pow", "print", "repr", "round", "setattr", "sorted", "sum", "vars",
    "delattr", "globals", "locals",
)  # fmt: skip

NOT_TAUGHT = re.compile(
    r"os\.path\.(isreserved|splitroot|isdevdrive)|time\.(clock_|pthread|thread_time|tzset)"
    r"|re\.template|glob\.glob[01]|tempfile\.\w+b$|collections\.User|random\.binomialvariate|\w+\.bool$"
)
"""Not on every supported version or system, or no use to a newcomer: the taught set should not vary by
machine."""


@dataclass(frozen=True, slots=True)
class Fact:
    """`name` is how a person would write the function; `summary` one sentence of its documentation, with
    its stop."""

    name: str
    summary: str
    module: str


_SIGNATURE = re.compile(r"^[\w.]*\(.*\)?\s*(->|--|$)|^[\w.]+\(.*\)\s*$")
_NOT_PROSE = re.compile(r"[\\|<>{}\[\]]|\(.*\(|->|==|\.\.$|etc\.?$|\beg\b")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)(?<!e\.g\.)(?<!i\.e\.)")


def summary_of(doc: str) -> str | None:
    """First sentence of a docstring without signature lines and markup; None where that is no plain short
    sentence."""
    lines = doc.strip().splitlines()
    while lines and (not lines[0].strip() or _SIGNATURE.match(lines[0].strip())):
        lines.pop(0)
    paragraph: list[str] = []
    for line in lines:
        if not line.strip() or line.lstrip().startswith((">>>", "-", "*", "::")):
            break
        paragraph.append(line.strip())
    text = re.sub(r"\s+", " ", " ".join(paragraph)).replace("`", "")
    text = re.sub(r"(?<!\*)\*(\w[\w -]*)\*(?!\*)", r"\1", text)
    text = re.sub(r":(\w+):(\w)", r"\2", text)
    end = _SENTENCE_END.search(text)
    sentence = text[: end.start()] if end else text.rstrip(":;,")
    if len(sentence) >= SUMMARY_CHARS[1]:  # an aside in brackets is the first thing to give up
        sentence = re.sub(r" \([^()]*\)", "", sentence)
    if not SUMMARY_CHARS[0] <= len(sentence) < SUMMARY_CHARS[1] or not sentence.isascii():
        return None
    if not re.match(r"[A-Z][a-z]", sentence) or _NOT_PROSE.search(sentence):
        return None
    return sentence + "."


def public_names(module: object) -> list[str]:
    """Names a module offers: its `__all__`, else what is spelt without a leading underscore; sorted."""
    names = getattr(module, "__all__", None) or [n for n in dir(module) if not n.startswith("_")]
    return sorted(set(names))


def _described() -> Iterator[tuple[str, str, object]]:
    """(module, name, object) in teaching order."""
    builtins = importlib.import_module("builtins")
    for kind in TYPES:
        for name in sorted(n for n in vars(kind) if not n.startswith("_")):
            yield kind.__name__, f"{kind.__name__}.{name}", getattr(kind, name)
    for name in BUILTINS:
        yield "builtins", name, getattr(builtins, name)
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in public_names(module):
            found = getattr(module, name, None)
            home = getattr(found, "__module__", "") or ""
            if inspect.isroutine(found) or (
                isinstance(found, type)
                and home.split(".")[0] in ("builtins", module_name)
                and not issubclass(found, BaseException)
            ):
                yield module_name, f"{module_name}.{name}", found


@cache
def facts(limit: int | None = None) -> tuple[Fact, ...]:
    """The facts of this Python, in a fixed order, summaries unique; the first `limit` of them by teaching
    order.

    Identical for one Python version; between 3.11 and 3.13 a few sentences differ because the documentation
    does.
    """
    taken: set[str] = set()
    out: list[Fact] = []
    for module, name, found in _described():
        doc = inspect.getdoc(found)
        summary = summary_of(doc) if doc and not NOT_TAUGHT.match(name) else None
        if summary is None or summary.casefold() in taken or name.split(".")[-1].startswith("_"):
            continue
        taken.add(summary.casefold())
        out.append(Fact(name, summary, module))
    return tuple(out[:limit] if limit is not None else out)
