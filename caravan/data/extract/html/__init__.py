"""HTML to its main content: `extract(html, url, engine)`, one file of this folder per engine.

    fast      resiliparse's content rules on a DOM in C (extra `extract`)
    accurate  trafilatura, precision first, with ours where it finds nothing (extra `extract`)
    plain     the standard library alone: blocks scored by text and links

An engine has NEEDS (the modules it imports late) and text(html, url) -> str.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from caravan.types import UserError

INSTALL = "pip install 'caravan-llm[extract]'"
_TITLE = re.compile(r"<title[^>]{0,200}>([^<]{0,1000})", re.I)
_BLANKS = " \t\f\v\xa0"
_GAPS = re.compile(r"\n{3,}")
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Extracted:
    """What a page says."""

    text: str
    """Paragraphs parted by newlines; empty if the page has no content."""
    title: str
    engine: str
    """The engine that did it: another than asked for if the extra is not installed."""


@lru_cache(maxsize=1)
def engines() -> tuple[str, ...]:
    """Names of the engines."""
    return tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_")))


@lru_cache(maxsize=8)
def usable(engine: str) -> str:
    """`engine`, or "plain" if the modules it needs are not installed. Raises UserError for another name."""
    if engine not in engines():
        raise UserError(f"there is no HTML engine `{engine}`", f"there are: {', '.join(engines())}")
    needs = importlib.import_module(f"{__name__}.{engine}").NEEDS
    return engine if all(importlib.util.find_spec(n.partition(".")[0]) for n in needs) else "plain"


def extract(html: str, url: str | None = None, engine: str = "fast") -> Extracted:
    """The main content of a page: text without menus, banners, comments and footers.

    `url` helps the accurate engine to tell what the page is. Never fetches anything. A page that breaks an
    engine is read by the plain one; `Extracted.engine` says which it was. Raises UserError for an unknown
    engine.
    """
    import html as entities

    name = usable(engine)
    found = _TITLE.search(html, 0, 200_000)
    title = " ".join(_encodable(entities.unescape(found[1])).split()) if found else ""
    try:
        text = _read(name, html, url)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, AssertionError):
        # Foreign code on hostile bytes; RuntimeError includes a tree too deep to recurse into.
        if name == "plain":
            raise
        name = "plain"
        text = _read(name, html, url)
    text = _encodable(text).replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    text = "\n".join([line.rstrip(_BLANKS) for line in text.split("\n")])
    return Extracted(_GAPS.sub("\n\n", text).strip(), title, name)


def _read(name: str, html: str, url: str | None) -> str:
    engine: Callable[[str, str | None], str] = importlib.import_module(f"{__name__}.{name}").text
    try:
        return engine(html, url)
    except (UnicodeEncodeError, TypeError):
        # Seldom what no UTF-8 holds; asking each page for it first would cost a twentieth of its time.
        clean = _encodable(html)
        if clean is html:
            raise
        return engine(clean, url)


def _encodable(text: str) -> str:
    """Without what no UTF-8 holds."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATES.sub(" ", text)
    return text
