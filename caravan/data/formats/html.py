"""Web pages: .html .htm .xhtml, one page is one document, its main content without menus and banners."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.extract import html, workers
from caravan.data.formats import _jobs
from caravan.data.formats._files import Limits, OnBad, Problem, called, chunks, suffix_of

KINDS = ("corpus",)
SUFFIXES = (".html", ".htm", ".xhtml", ".shtml")
_OPENS = re.compile(
    rb"\s*(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]{0,200}\?>\s*)?(?:<!--.{0,500}?-->\s*)*<(?:!doctype\s+html|html[\s>])",
    re.I | re.S,
)


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if not isinstance(sample, bytes):
        return None
    suffix = suffix_of(path)
    if suffix in SUFFIXES:
        return f"the name ends in {suffix}{by_whom()}"
    if suffix in ("", ".php", ".asp", ".aspx", ".jsp", ".cgi") and _OPENS.match(sample):
        return f"it begins like a web page{by_whom()}"
    return None


def by_whom() -> str:
    """A remark if the extra is not installed; empty otherwise."""
    if html.usable("fast") == "fast":
        return ""
    return f"; read by simple rules, {html.INSTALL} reads better"


def jobs(path: Path, on_bad: OnBad, limits: Limits) -> Iterator[workers.Job]:
    held, size = [], 0
    for chunk in chunks(path, on_bad, limits):
        held.append(chunk)
        size += len(chunk)
        if size > limits.page_bytes:
            on_bad(Problem(path, "", f"a page of at most {limits.page_bytes:,} bytes", ""))
            return
    if held:
        note = _jobs.Note(path, "", called(Path(path.name)), "a page")
        yield workers.Job({"work": "page", "engine": limits.html}, b"".join(held), note)


read = _jobs.reader(jobs)
