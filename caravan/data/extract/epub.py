"""EPUB 2 and 3: the chapters of the spine in reading order, by the standard library alone.

Navigation documents are left out. A chapter is not searched for its "main content" (all of it is); only
scripts and styles go.
"""

from __future__ import annotations

import posixpath
from urllib.parse import unquote

from caravan.data.extract import chapters
from caravan.data.extract.archive import Archive
from caravan.data.extract.encoding import decode
from caravan.data.extract.problems import Unreadable

_BOOK = (".xhtml", ".html", ".htm", ".xml")


def text(path: str, limit: int = 256 << 20) -> tuple[str, str]:
    """(text, title) of a book; raises Unreadable."""
    book = Archive(path, limit)
    container = book.xml("META-INF/container.xml")
    roots = [e.get("full-path") for e in container.iter() if e.tag.endswith("}rootfile")]
    if not roots or not roots[0]:
        raise Unreadable("an EPUB that names its package document")
    package = book.xml(roots[0])
    folder = posixpath.dirname(roots[0])
    items = {e.get("id"): e for e in package.iter() if e.tag.endswith("}item")}
    title = next((e.text or "" for e in package.iter() if e.tag.endswith("}title")), "")
    parts = []
    for ref in package.iter():
        item = items.get(ref.get("idref")) if ref.tag.endswith("}itemref") else None
        if item is None or "nav" in (item.get("properties") or "").split():
            continue
        name = posixpath.normpath(posixpath.join(folder, unquote(item.get("href") or "")))
        if not name.lower().endswith(_BOOK) and "html" not in (item.get("media-type") or ""):
            continue
        parts.append(chapters.text(decode(book.read(name), html=True).text))
    said = "\n\n".join(p for p in parts if p)
    if not said:
        raise Unreadable("an EPUB with text in its spine")
    return said, " ".join(title.split())
