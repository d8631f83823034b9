"""Files to bytes and lines, whatever they are packed in: .gz .bz2 .xz .zst.

Memory is bounded by the limits, whatever a file says about itself: a line that is too long is skipped unread,
a file that unpacks to hundreds of times its size is given up, an .xz that wants a huge dictionary is refused.
UTF-16 and UTF-32 with a byte order mark become UTF-8 on the way.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from caravan.data.extract import encoding
from caravan.types import UserError

PACKED = (".gz", ".bz2", ".xz", ".zst")
_CHUNK = 1 << 16
_DICTIONARY = 256 << 20
"""Memory an .xz or .zst file may ask for (bytes)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that could not be read: where, what was expected, and how it begins."""

    path: Path
    place: str
    """`line 7`, `record 7`, or empty for the whole file."""
    expected: str
    sample: str

    def __str__(self) -> str:
        where = f"{self.path}" + (f", {self.place}" if self.place else "")
        return f"{where}: expected {self.expected}"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is held in memory at a time, and what is asked of the extractors."""

    record_bytes: int = 16 << 20
    """Longer lines are refused."""
    array_bytes: int = 64 << 20
    """Larger JSON arrays are taken apart record by record, which is slower."""
    document_chars: int = 100_000
    """Longer text files become several documents, cut at an empty line."""
    page_bytes: int = 16 << 20
    """Larger web pages and records of web archives are refused."""
    ratio: int = 400
    """A packed file that unpacks to more than this many times its size is given up ..."""
    ratio_free_bytes: int = 64 << 20
    """... once it has given so many bytes."""
    unpacked_bytes: int = 256 << 20
    """PDFs, books and Word documents may unpack to so many bytes."""
    html: str = "fast"
    """Engine for web pages: fast, accurate or plain."""
    workers: int = 1
    """Processes that extract. The answers and their order do not depend on it."""


OnBad = Callable[[Problem], None]


class Bomb(ValueError):
    """A packed file that unpacks to far too much."""


def suffix_of(path: Path) -> str:
    """The suffix below any packing: `.jsonl` of `a.jsonl.zst`."""
    suffixes = [s.lower() for s in path.suffixes]
    while suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def called(path: Path) -> str:
    """A path as text that can be written: bytes of a name that are not UTF-8 become `\\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def chunks(path: Path, on_bad: OnBad, limits: Limits | None = None) -> Iterator[bytes]:
    """Unpacked bytes. A truncated or damaged file gives what comes before the damage, and a problem."""
    suffix, limits = path.suffix.lower(), limits or Limits()
    damage = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zstandard.ZstdError, Bomb)
    try:
        with open(path, "rb") as file:
            if suffix in PACKED:
                yield from _bounded(_unpacked(file, suffix), file, limits)
            else:
                while chunk := file.read(_CHUNK):
                    yield chunk
    except damage as error:
        on_bad(Problem(path, "", f"a complete {suffix} file ({error})", ""))
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "check its rights") from error
    except OSError as error:
        if suffix not in PACKED:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        on_bad(Problem(path, "", f"a complete {suffix} file ({error})", ""))


def _bounded(given: Iterator[bytes], file: BinaryIO, limits: Limits) -> Iterator[bytes]:
    size = 0
    for chunk in given:
        size += len(chunk)
        if size > limits.ratio_free_bytes and size > limits.ratio * max(1, file.tell()):
            raise Bomb(f"it unpacks to more than {limits.ratio} times its size")
        yield chunk


def _unpacked(file: BinaryIO, suffix: str) -> Iterator[bytes]:
    if suffix == ".zst":
        yield from _unzstd(file)
    elif suffix == ".xz":
        yield from _streams(file, lambda: lzma.LZMADecompressor(memlimit=_DICTIONARY), b"\0")
    elif suffix == ".bz2":
        yield from _streams(file, bz2.BZ2Decompressor, b"")
    else:
        with gzip.open(file) as packed:
            while chunk := packed.read1(_CHUNK):
                yield chunk


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    """Frame after frame; a file that stops inside one is an error (the library's reader just ends there).

    A decompressor gives all that its input holds, up to 128 KB for 4 bytes: input goes in by small pieces.
    """
    frame, held, size = None, [], 0
    while data := file.read(512):
        while data:
            if frame is None:
                frame = zstandard.ZstdDecompressor(max_window_size=_DICTIONARY >> 1).decompressobj()
            out = frame.decompress(data)
            held.append(out)
            size += len(out)
            if size >= _CHUNK:
                yield b"".join(held)
                held, size = [], 0
            data = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if held:
        yield b"".join(held)
    if frame is not None:
        raise EOFError("it stops inside a frame")


def _streams(file: BinaryIO, start: Callable[[], Any], padding: bytes) -> Iterator[bytes]:
    """Stream after stream of .xz or .bz2 with bounded output; `padding` may stand between two.

    lzma.open bounds neither output nor dictionary, and both libraries' files pass over what follows a whole
    stream without being one: a damaged head there would lose the rest in silence.
    """
    stream, fresh = start(), True
    data = b""
    while True:
        if stream.eof:
            data = stream.unused_data.lstrip(padding) or file.read(_CHUNK).lstrip(padding)
            if not data:
                return
            stream = start()
        elif stream.needs_input:
            data = file.read(_CHUNK)
            if not data:
                raise EOFError("it is empty" if fresh else "it stops inside a stream")
        else:
            data = b""
        fresh = False
        if out := stream.decompress(data, _CHUNK):
            yield out


def lines(path: Path, on_bad: OnBad, limits: Limits) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its line end). Too long a line goes to `on_bad` and is skipped unread."""
    rest, number, skipping = bytearray(), 0, False
    for chunk in _as_utf8(chunks(path, on_bad, limits)):
        parts = chunk.split(b"\n")
        last = parts.pop()
        for part in parts:
            number += 1
            line = bytes(rest) + part if rest else part
            rest.clear()
            if skipping:
                skipping = False
            elif len(line) > limits.record_bytes:
                on_bad(_too_long(path, number, line, limits))
            else:
                yield number, line + b"\n"
        if skipping:
            continue
        rest += last
        if len(rest) > limits.record_bytes:
            on_bad(_too_long(path, number + 1, rest[:1000], limits))
            rest, skipping = bytearray(), True
    if rest and not skipping:
        yield number + 1, bytes(rest)


def _as_utf8(given: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes; UTF-16 and UTF-32 behind a byte order mark are turned into UTF-8."""
    first = next(given, b"")
    name = encoding.mark(first)
    if name in ("utf-16", "utf-32"):
        decoder = codecs.getincrementaldecoder(name)("replace")
        yield decoder.decode(first).encode("utf-8", "replace")
        for chunk in given:
            yield decoder.decode(chunk).encode("utf-8", "replace")
        yield decoder.decode(b"", True).encode("utf-8", "replace")
        return
    yield first
    yield from given


def _too_long(path: Path, number: int, line: bytes | bytearray, limits: Limits) -> Problem:
    return Problem(path, f"line {number}", f"a line of at most {limits.record_bytes:,} bytes", shown(line))


def shown(line: bytes | bytearray) -> str:
    """How a line begins, for a complaint."""
    return line[:200].decode("utf-8", "replace")
