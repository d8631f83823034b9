"""Web archives (WARC 1.0 and 1.1, ISO 28500), record by record with bounded memory.

A .warc.gz is one gzip member per record. A damaged member costs that record alone: the reader looks for the
next member's magic bytes and goes on. Bodies longer than the limit are skipped unread. HTTP answers are taken
apart: status, type, charset, chunked transfer and gzip or deflate coding.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

_CHUNK = 1 << 16
_MAGIC = b"\x1f\x8b\x08"
_HEAD = 1 << 16
"""Longest header of a record or of an HTTP answer (bytes)."""
Complain = Callable[[str, str], None]
"""complain(place, what was expected)."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record: its place in the file, its headers (names in lower case) and its block."""

    place: str
    headers: Mapping[str, str]
    block: bytes

    @property
    def kind(self) -> str:
        return self.headers.get("warc-type", "")

    @property
    def url(self) -> str:
        return self.headers.get("warc-target-uri", "").strip("<>")


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer."""

    status: int
    type: str
    """`text/html`, in lower case without parameters."""
    charset: str
    body: bytes


class _Source:
    """Bytes of an archive, plain or gzip, that can be read exactly and looked ahead in."""

    def __init__(self, file: BinaryIO, complain: Complain) -> None:
        self._parts = _unpacked(file, complain)
        self._held = b""

    def more(self) -> bool:
        part = next(self._parts, b"")
        self._held += part
        return bool(part)

    def until(self, mark: bytes, most: int) -> bytes | None:
        """Up to and including `mark`; None at the end of the file or beyond `most`."""
        while (at := self._held.find(mark)) < 0:
            if len(self._held) > most or not self.more():
                return None
        taken, self._held = self._held[: at + len(mark)], self._held[at + len(mark) :]
        return taken

    def take(self, size: int, keep: bool) -> bytes | None:
        """Exactly `size` bytes, or b"" if they are not to be kept; None if the file ends before."""
        kept = []
        while size > 0:
            if not self._held and not self.more():
                return None
            part, self._held = self._held[:size], self._held[size:]
            size -= len(part)
            if keep:
                kept.append(part)
        return b"".join(kept)

    def seek_record(self) -> bool:
        """Go to the next `WARC/1.`; False at the end of the file."""
        while (at := self._held.find(b"WARC/1.")) < 0:
            self._held = self._held[-6:]
            if not self.more():
                return False
        self._held = self._held[at:]
        return True


def _unpacked(file: BinaryIO, complain: Complain) -> Iterator[bytes]:
    """The file's bytes, unpacked if it is gzip; after a damaged member goes on at the next one."""
    data = file.read(_CHUNK)
    if not data.startswith(_MAGIC[:2]):
        while data:
            yield data
            data = file.read(_CHUNK)
        return
    member = zlib.decompressobj(31)
    while True:
        if not data:
            data = file.read(_CHUNK)
            if not data:
                break
        try:
            out = member.decompress(data, _CHUNK << 2)
        except zlib.error as error:
            complain(f"byte {file.tell() - len(data):,}", f"a sound gzip member ({error})")
            data = _next_member(file, data[1:])
            member = zlib.decompressobj(31)
            continue
        if out:
            yield out
        data = member.unused_data if member.eof else member.unconsumed_tail
        if member.eof:
            member = zlib.decompressobj(31)
            data = data.lstrip(b"\0")  # padding between members
            if not data:
                data = file.read(_CHUNK)
                if not data:
                    return
    complain("", "a complete .gz file (it stops inside a member)")


def _next_member(file: BinaryIO, data: bytes) -> bytes:
    while (at := data.find(_MAGIC)) < 0:
        more = file.read(_CHUNK)
        if not more:
            return b""
        data = data[-2:] + more
    return data[at:]


def records(file: BinaryIO, complain: Complain, block_bytes: int, kinds: frozenset[str]) -> Iterator[Record]:
    """Records of the given kinds ("response", "conversion" ...) whose block is at most `block_bytes` long.

    Longer ones and broken ones go to `complain(place, expected)`, others are passed over in silence.
    """
    source = _Source(file, complain)
    number = 0
    while source.seek_record():
        number += 1
        place = f"record {number}"
        head = source.until(b"\r\n\r\n", _HEAD)
        if head is None:
            complain(place, f"a header of at most {_HEAD:,} bytes that ends in an empty line")
            if source.take(1, False) is None:
                return
            continue
        headers = _headers(head)
        size = headers.get("content-length", "")
        if not size.isascii() or not size.isdigit() or len(size) > 15:
            complain(place, "a WARC header with Content-Length")
            continue
        wanted = headers.get("warc-type", "") in kinds
        fits = int(size) <= block_bytes
        block = source.take(int(size), wanted and fits)
        if block is None:
            complain(place, f"a block of {int(size):,} bytes (the file ends inside it)")
            return
        if wanted and not fits:
            complain(place, f"a block of at most {block_bytes:,} bytes, not {int(size):,}")
        elif wanted:
            yield Record(place, headers, block)
    if not number:
        complain("", "a WARC file (there is no record in it)")


def _headers(head: bytes) -> dict[str, str]:
    """Header lines behind the first, names in lower case; the first of equal names holds."""
    found: dict[str, str] = {}
    last = ""
    for line in head.decode("utf-8", "replace").split("\n")[1:]:
        if line[:1] in (" ", "\t") and last in found:
            found[last] += " " + line.strip()
            continue
        name, colon, value = line.partition(":")
        last = name.strip().lower()
        if colon and last not in found:
            found[last] = value.strip()
    return found


def answer(block: bytes, body_bytes: int) -> Answer:
    """An HTTP answer taken apart. Raises ValueError with what was expected."""
    line, _, _ = block[:_HEAD].partition(b"\n")
    end = min((block.find(m) + len(m) for m in (b"\r\n\r\n", b"\n\n") if m in block[:_HEAD]), default=0)
    parts = line.split()
    if not line.startswith(b"HTTP/") or not end or len(parts) < 2 or not parts[1].isdigit():
        raise ValueError("an HTTP answer")
    headers = _headers(block[:end])
    body = block[end:]
    # Crawls often store the decoded body under the headers of the coded one: believe the bytes.
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = _unchunked(body)
    if headers.get("content-encoding", "").lower() in ("gzip", "x-gzip", "deflate"):
        body = _decoded(body, body_bytes)
    kind, _, rest = headers.get("content-type", "").partition(";")
    charset = rest.lower().partition("charset=")[2].partition(";")[0].strip(" \"'")
    return Answer(int(parts[1][:3]), kind.strip().lower(), charset, body)


def _unchunked(body: bytes) -> bytes:
    out: list[bytes] = []
    at = 0
    while True:
        end = body.find(b"\r\n", at, at + 100)
        size = body[at:end].partition(b";")[0].strip() if end > at else b""
        try:
            length = int(size, 16)
        except ValueError:
            return body if not out else b"".join(out)
        if length <= 0:
            return b"".join(out)
        out.append(body[end + 2 : end + 2 + length])
        at = end + 4 + length


def _decoded(body: bytes, most: int) -> bytes:
    """gzip, zlib or raw deflate; the body itself if it is none of them. ValueError beyond `most` bytes."""
    for bits in (47, -15):
        unpack = zlib.decompressobj(bits)
        try:
            out = unpack.decompress(body, most)
        except zlib.error:
            continue
        if unpack.unconsumed_tail:
            raise ValueError(f"a body of at most {most:,} bytes unpacked")
        return out
    return body
