"""Files to records: JSON lines, JSON arrays and tables, packed or not; what several formats ask of one.

Nothing here reads a whole file, or a line longer than the limit, into memory. Every complaint names the file,
the place and what was expected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from caravan.data.formats import _tables
from caravan.data.formats._packed import Limits, OnBad, Problem, called, chunks, lines, shown, suffix_of
from caravan.types import Conversation, Document, Labelled, Ranking

__all__ = ["Bad", "Convert", "Found", "Limits", "OnBad", "Problem", "called", "chunks", "lines", "suffix_of"]

RECORDS = (".jsonl", ".ndjson", ".json", *_tables.TABLES)


@dataclass(frozen=True, slots=True)
class Found:
    """One thing read, with the split its record asks for ("train", "heldout", or "" to let the stage
    decide)."""

    value: Document | Conversation | Ranking | Labelled
    split: str = ""
    place: str = ""
    """`record 7` or `line 7` of its file; `file` is filled in by `read_all`."""
    file: str = ""


Convert = Callable[[dict[str, Any], str], Iterator[Conversation | Ranking | Labelled | Document]]


class Bad(ValueError):
    """A record that is not what its format says; the text says what was expected."""


def records(path: Path, on_bad: OnBad, limits: Limits) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, JSON object) of every record of a .jsonl, .json, .parquet, .arrow or .csv file."""
    suffix = suffix_of(path)
    if suffix == ".parquet":
        rows: Iterator[tuple[str, Any]] = _tables.parquet(path, on_bad, limits)
    elif suffix in _tables.ARROW:
        rows = _tables.arrow(path, on_bad, limits)
    elif suffix in _tables.TABLES:
        rows = _tables.separated(path, on_bad, limits)
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
            on_bad(Problem(path, f"line {number}", f"one JSON object per line ({error})", shown(line)))


def _array(path: Path, on_bad: OnBad, limits: Limits) -> Iterator[tuple[str, Any]]:
    """A JSON array, a single object, or JSON lines that call themselves .json."""
    held: list[bytes] = []
    size = 0
    for chunk in chunks(path, on_bad, limits):
        held.append(chunk)
        size += len(chunk)
        if size > limits.array_bytes:
            held.clear()
            yield from _large_array(path, on_bad, limits)
            return
    text = b"".join(held).removeprefix(b"\xef\xbb\xbf")
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        first = text.lstrip()[:1]
        if first == b"{" and b"\n" in text:
            yield from _json_lines(path, on_bad, limits)
        else:
            on_bad(Problem(path, "", f"a JSON array ({error})", shown(text)))
        return
    if isinstance(found, list):
        yield from ((f"record {n}", row) for n, row in enumerate(found, 1))
    else:
        yield "record 1", found


_SYNTAX = re.compile(rb'["\\\[\]{},]')


def _large_array(path: Path, on_bad: OnBad, limits: Limits) -> Iterator[tuple[str, Any]]:
    """The elements of an array too large to hold, cut at the commas of its outermost level."""
    held, at, depth, quoted, number = bytearray(), 0, 0, False, 0
    for chunk in chunks(path, on_bad, limits):
        if not held and depth == 0 and number == 0:
            chunk = chunk.removeprefix(b"\xef\xbb\xbf").lstrip()
            if chunk[:1] != b"[":
                yield from _json_lines(path, on_bad, limits)
                return
        held += chunk
        start = 0
        while found := _SYNTAX.search(held, at):
            mark, at = found[0], found.end()
            if mark == b"\\":
                if at == len(held):
                    at -= 1  # what it escapes is in the next chunk
                    break
                at += quoted
            elif mark == b'"':
                quoted = not quoted
            elif quoted:
                continue
            elif mark in b"[{":
                depth += 1
                start = at if depth == 1 else start
            elif mark in b"]}":
                depth -= 1
            if not quoted and (depth == 0 or (depth == 1 and mark == b",")):
                if element := bytes(held[start : at - 1]).strip():
                    number += 1
                    yield from _element(path, f"record {number}", element, on_bad)
                start = at
                if depth == 0:
                    return
        else:
            at = len(held)
        del held[:start]
        at -= start
        if len(held) > limits.record_bytes:
            expected = f"a record of at most {limits.record_bytes:,} bytes"
            on_bad(Problem(path, f"record {number + 1}", expected, shown(held)))
            return
    on_bad(Problem(path, "", "a JSON array that is closed", ""))


def _element(path: Path, place: str, element: bytes, on_bad: OnBad) -> Iterator[tuple[str, Any]]:
    try:
        yield place, orjson.loads(element)
    except orjson.JSONDecodeError as error:
        on_bad(Problem(path, place, f"a JSON value ({error})", shown(element)))


def sample_of(
    path: Path, limits: Limits, on_bad: OnBad, count: int = 16
) -> list[dict[str, Any]] | list[bytes]:
    """The first records of a file of records, or the first bytes of any other."""
    if suffix_of(path) in RECORDS:
        return [row for _, row in islice(records(path, on_bad, limits), count)]
    return [next(chunks(path, on_bad, limits), b"")[:4096]]


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


def text_of(row: dict[str, Any], key: str, missing: str | None = None) -> str:
    """A text field; Bad if it is something else, or absent without a stand-in."""
    value = row.get(key)
    if value is None and missing is not None:
        return missing
    if not isinstance(value, str):
        raise Bad(f"a text under {key!r}")
    return value


def id_of(row: dict[str, Any]) -> str:
    """The record's own id, or empty."""
    value = next((row[k] for k in ("id", "prompt_id", "conversation_id") if row.get(k) is not None), None)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def source_of(row: dict[str, Any]) -> str:
    """The record's own source, or empty."""
    value = row.get("source")
    return value if isinstance(value, str) else ""
