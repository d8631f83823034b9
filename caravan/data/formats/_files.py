"""Files to lines and records, whatever they are packed in: .gz .bz2 .xz .zst, JSON lines, JSON arrays,
parquet.

Nothing here reads a whole compressed file, or a line longer than the limit, into memory (a JSON array is one
value and must be). Every complaint names the file, the place and what was expected.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import zstandard

from caravan.types import Conversation, Document, Message, Ranking, UserError

PACKED = (".gz", ".bz2", ".xz", ".zst")
RECORDS = (".jsonl", ".ndjson", ".json", ".parquet")
_CHUNK = 1 << 16


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
class Found:
    """One thing read, with the split its record asks for ("train", "heldout", or "" to let the stage
    decide)."""

    value: Document | Conversation | Ranking
    split: str = ""
    place: str = ""
    """`record 7` or `line 7` of its file; `file` is filled in by `read_all`."""
    file: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is held in memory at a time."""

    record_bytes: int = 16 << 20
    """Longer lines are refused."""
    array_bytes: int = 2 << 30
    """Larger JSON arrays are refused."""
    document_chars: int = 100_000
    """Longer text files become several documents, cut at an empty line."""


OnBad = Callable[[Problem], None]
Convert = Callable[[dict[str, Any], str], Iterator[Conversation | Ranking | Document]]


class Bad(ValueError):
    """A record that is not what its format says; the text says what was expected."""


def suffix_of(path: Path) -> str:
    """The suffix below any packing: `.jsonl` of `a.jsonl.zst`."""
    suffixes = [s.lower() for s in path.suffixes]
    while suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def chunks(path: Path, on_bad: OnBad) -> Iterator[bytes]:
    """Unpacked bytes. A truncated or damaged file gives what comes before the damage, and a problem."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".zst":
            yield from _unzstd(path)
        else:
            opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, Path.open)
            with opener(path, "rb") as file:
                read = getattr(file, "read1", file.read)
                while chunk := read(_CHUNK):
                    yield chunk
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zstandard.ZstdError) as error:
        on_bad(Problem(path, "", f"a complete {suffix} file ({error})", ""))
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "check its rights") from error
    except OSError as error:
        if suffix not in PACKED:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        on_bad(Problem(path, "", f"a complete {suffix} file ({error})", ""))


def _unzstd(path: Path) -> Iterator[bytes]:
    """Frame after frame; a file that stops inside one is an error (the library's reader just ends there)."""
    frame = None
    with open(path, "rb") as file:
        while data := file.read(_CHUNK >> 2):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                if out := frame.decompress(data):
                    yield out
                data = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    if frame is not None:
        raise EOFError("it stops inside a frame")


def lines(path: Path, on_bad: OnBad, limits: Limits) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its line end). Too long a line goes to `on_bad` and is skipped unread."""
    rest, number, skipping = b"", 0, False
    for chunk in chunks(path, on_bad):
        parts = (rest + chunk).split(b"\n")
        rest = parts.pop()
        for part in parts:
            number += 1
            if skipping:
                skipping = False
            elif len(part) > limits.record_bytes:
                on_bad(_too_long(path, number, part, limits))
            else:
                yield number, part + b"\n"
        if len(rest) > limits.record_bytes:
            if not skipping:
                on_bad(_too_long(path, number + 1, rest, limits))
            rest, skipping = b"", True
    if rest and not skipping:
        yield number + 1, rest


def _too_long(path: Path, number: int, line: bytes, limits: Limits) -> Problem:
    return Problem(path, f"line {number}", f"a line of at most {limits.record_bytes:,} bytes", _shown(line))


def _shown(line: bytes) -> str:
    return line[:200].decode("utf-8", "replace")


def records(path: Path, on_bad: OnBad, limits: Limits) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, JSON object) of every record of a .jsonl, .json or .parquet file, packed or not."""
    suffix = suffix_of(path)
    if suffix == ".parquet":
        rows: Iterator[tuple[str, Any]] = _parquet(path, on_bad)
    elif suffix == ".json":
        rows = _array(path, on_bad, limits)
    else:
        rows = _json_lines(path, on_bad, limits)
    for place, row in rows:
        if isinstance(row, dict):
            yield place, row
        else:
            on_bad(Problem(path, place, "a JSON object", str(row)[:200]))


def _json_lines(path: Path, on_bad: OnBad, limits: Limits) -> Iterator[tuple[str, Any]]:
    for number, line in lines(path, on_bad, limits):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        try:
            yield f"line {number}", orjson.loads(line)
        except orjson.JSONDecodeError as error:
            on_bad(Problem(path, f"line {number}", f"one JSON object per line ({error})", _shown(line)))


def _array(path: Path, on_bad: OnBad, limits: Limits) -> Iterator[tuple[str, Any]]:
    """A JSON array, a single object, or JSON lines that call themselves .json."""
    held: list[bytes] = []
    size = 0
    for chunk in chunks(path, on_bad):
        held.append(chunk)
        size += len(chunk)
        if size > limits.array_bytes:
            on_bad(Problem(path, "", f"a JSON array of at most {limits.array_bytes:,} bytes; use .jsonl", ""))
            return
    text = b"".join(held).removeprefix(b"\xef\xbb\xbf")
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        first = text.lstrip()[:1]
        if first == b"{" and b"\n" in text:
            yield from _json_lines(path, on_bad, limits)
        else:
            on_bad(Problem(path, "", f"a JSON array ({error})", _shown(text)))
        return
    if isinstance(found, list):
        yield from ((f"record {n}", row) for n, row in enumerate(found, 1))
    else:
        yield "record 1", found


def _parquet(path: Path, on_bad: OnBad) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"record {number}", {k: v for k, v in row.items() if v is not None}
    except (pyarrow.ArrowException, OSError) as error:
        on_bad(Problem(path, "", f"a parquet file ({str(error)[:200]})", ""))


def sample_of(
    path: Path, limits: Limits, on_bad: OnBad, count: int = 16
) -> list[dict[str, Any]] | list[bytes]:
    """The first records of a file of records, or the first bytes of any other."""
    if suffix_of(path) in RECORDS:
        return [row for _, row in islice(records(path, on_bad, limits), count)]
    return [next(chunks(path, on_bad), b"")[:4096]]


def reader(convert: Convert) -> Callable[[Path, str, OnBad, Limits], Iterator[Found]]:
    """`read` of a format whose records are JSON objects, from what turns one of them into our words."""

    def read(path: Path, kind: str, on_bad: OnBad, limits: Limits) -> Iterator[Found]:
        for place, row in records(path, on_bad, limits):
            split = row.get("split")
            split = split if split in ("train", "heldout") else ""
            try:
                found = list(convert(row, kind))
            except Bad as error:
                on_bad(Problem(path, place, str(error), orjson.dumps(row, default=str).decode()[:200]))
                continue
            yield from (Found(value, split, place) for value in found)

    return read


# -- what several formats ask of a record --------------------------------------------------------------------

_ROLES = {
    "human": "user", "user": "user", "prompter": "user", "question": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard":
    "assistant", "model": "assistant", "bot": "assistant", "answer": "assistant", "function_call":
    "assistant", "system": "system", "developer": "system", "tool": "tool", "function": "tool",
    "observation": "tool", "ipython": "tool", "function_response": "tool", }  # fmt: skip


def text_of(row: dict[str, Any], key: str, missing: str | None = None) -> str:
    """A text field; Bad if it is something else, or absent without a stand-in."""
    value = row.get(key)
    if value is None and missing is not None:
        return missing
    if not isinstance(value, str):
        raise Bad(f"a text under {key!r}")
    return value


def message_of(turn: Any) -> Message:
    """One turn, {from, value} or {role, content}; content may be a list of text parts."""
    if not isinstance(turn, dict):
        raise Bad("turns that are objects with a role and a text")
    given = turn.get("role", turn.get("from"))
    role = _ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        raise Bad(f"a role that is one of {', '.join(sorted(_ROLES))}, not {given!r}")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) else p for p in content]
        texts = [p for p in parts if isinstance(p, str)]
        if len(texts) < len(parts):
            raise Bad("text alone in a turn (images and sound are not read)")
        content = "".join(texts)
    if not isinstance(content, str):
        raise Bad("a text in every turn")
    if given == "function_call":
        content = f"<tool_call>\n{content}\n</tool_call>"
    return Message(role, content)


def messages_of(turns: Any) -> tuple[Message, ...]:
    """A list of turns; Bad if it is empty or not a list."""
    if not isinstance(turns, list) or not turns:
        raise Bad("a list of turns that is not empty")
    return tuple(message_of(t) for t in turns)


def with_system(row: dict[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """`messages` behind the record's own system text, if it has one apart and they do not begin with one."""
    system = row.get("system", row.get("system_prompt"))
    if isinstance(system, str) and system.strip() and messages[0].role != "system":
        return (Message("system", system), *messages)
    return messages


def id_of(row: dict[str, Any]) -> str:
    """The record's own id, or empty."""
    value = row.get("id", row.get("prompt_id"))
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def source_of(row: dict[str, Any]) -> str:
    """The record's own source, or empty."""
    value = row.get("source")
    return value if isinstance(value, str) else ""
