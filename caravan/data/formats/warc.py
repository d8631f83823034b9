"""Web archives: .warc .wet, packed by record or not; one page (or one extracted text) is one document.

HTTP answers with status 200 and an HTML type are extracted like web pages; text/plain answers and the
conversions of WET files are text as it is. The document's id is the page's address.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.extract import encoding, warc, workers
from caravan.data.formats import _jobs
from caravan.data.formats._files import Found, Limits, OnBad, Problem, chunks, suffix_of
from caravan.data.formats.html import by_whom
from caravan.types import Document, UserError

KINDS = ("corpus",)
SUFFIXES = (".warc", ".wet")
_HTML = ("text/html", "application/xhtml+xml")
_KINDS = frozenset(("response", "resource", "conversion"))


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if not isinstance(sample, bytes):
        return None
    if sample.startswith((b"WARC/1.0\r\n", b"WARC/1.1\r\n")):
        return f"it begins with a WARC header{by_whom()}"
    suffix = suffix_of(path)
    return f"the name ends in {suffix}{by_whom()}" if suffix in SUFFIXES else None


def jobs(path: Path, on_bad: OnBad, limits: Limits) -> Iterator[workers.Job | Found]:
    def complain(place: str, expected: str) -> None:
        on_bad(Problem(path, place, expected, ""))

    try:
        with open(path, "rb") as raw:
            gzip = path.suffix.lower() == ".gz" or raw.peek(2)[:2] == b"\x1f\x8b"
            source: Any = (
                raw if gzip or suffix_of(path) == path.suffix.lower() else _Joined(path, on_bad, limits)
            )
            for record in warc.records(source, complain, limits.page_bytes, _KINDS):
                yield from _item(record, path, on_bad, limits)
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "check its rights") from error


class _Joined:
    """`read` over the unpacked bytes of a .zst, .xz or .bz2 file."""

    def __init__(self, path: Path, on_bad: OnBad, limits: Limits) -> None:
        self._chunks = chunks(path, on_bad, limits)
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        chunk = next(self._chunks, b"")
        self._at += len(chunk)
        return chunk

    def tell(self) -> int:
        return self._at


def _item(record: warc.Record, path: Path, on_bad: OnBad, limits: Limits) -> Iterator[workers.Job | Found]:
    body, charset, kind = record.block, "", record.headers.get("content-type", "").partition(";")[0].lower()
    if record.kind == "response" and kind not in _HTML:
        try:
            answer = warc.answer(record.block, limits.page_bytes)
        except ValueError as error:
            on_bad(Problem(path, record.place, str(error), record.url))
            return
        if answer.status != 200:
            return  # redirects and errors hold no content
        body, charset, kind = answer.body, answer.charset, answer.type
    if not body.strip():
        return
    if kind in _HTML or (not kind and body[:500].lstrip()[:1] == b"<"):
        head = {"work": "page", "engine": limits.html, "url": record.url or None, "charset": charset}
        yield workers.Job(head, body, _jobs.Note(path, record.place, record.url, "a page"))
    elif kind == "text/plain":
        decoded = encoding.decode(body, charset)
        if decoded.damaged > 0.01 * len(decoded.text):
            on_bad(Problem(path, record.place, f"text in {decoded.encoding}", decoded.text[:200]))
        elif encoding.mojibake(decoded.text) > _jobs.GARBLED:
            on_bad(Problem(path, record.place, "text decoded in its own encoding", decoded.text[:200]))
        else:
            yield Found(Document(record.url, decoded.text), "", record.place)


def read(path: Path, kind: str, on_bad: OnBad, limits: Limits) -> Iterator[Found]:
    for item in jobs(path, on_bad, limits):
        if isinstance(item, Found):
            yield item
        else:
            yield from _jobs.settle(item, workers.one(item), on_bad)
