"""Rows of tables: Parquet, Arrow (file and stream), CSV and TSV, a batch at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.extract import encoding
from caravan.data.formats._packed import Limits, OnBad, Problem, chunks, lines

ARROW = (".arrow", ".feather", ".ipc")
TABLES = (".parquet", ".csv", ".tsv", *ARROW)
_ROWS = 256
_END = b"\xff\xff\xff\xff\0\0\0\0"
"""Ends an Arrow stream; one that was cut between two batches is told by its absence."""


def parquet(path: Path, on_bad: OnBad) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row; empty cells are left out."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in _rows(batch):
                    number += 1
                    yield f"record {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        on_bad(Problem(path, "", f"a parquet file ({str(error)[:200]})", ""))


def arrow(path: Path, on_bad: OnBad) -> Iterator[tuple[str, Any]]:
    """(place, row) of an Arrow file or stream (what `datasets` keeps in its cache)."""
    import pyarrow
    import pyarrow.ipc

    number = 0
    try:
        with pyarrow.OSFile(str(path)) as file:
            for batch in _arrow_batches(file, pyarrow.ipc):
                for start in range(0, batch.num_rows, _ROWS):
                    for row in _rows(batch.slice(start, _ROWS)):
                        number += 1
                        yield f"record {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        on_bad(Problem(path, "", f"an Arrow file or stream ({str(error)[:200]})", ""))


def _arrow_batches(file: Any, ipc: Any) -> Iterator[Any]:
    if file.read(6) == b"ARROW1":
        reader = ipc.open_file(file)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        file.seek(0)
        yield from ipc.open_stream(file)
        file.seek(max(0, file.size() - 8))
        if file.read(8) != _END:
            raise ValueError("it stops before its end mark")


def _rows(batch: Any) -> Iterator[Any]:
    """Rows as dicts. A cell that is not UTF-8 makes its row a sentence instead of stopping the file."""
    try:
        for row in batch.to_pylist():
            yield {k: v for k, v in row.items() if v is not None}
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                (row,) = batch.slice(i, 1).to_pylist()
                yield {k: v for k, v in row.items() if v is not None}
            except UnicodeDecodeError as error:
                yield f"a cell that is not UTF-8 ({error.reason})"


def separated(path: Path, on_bad: OnBad, limits: Limits) -> Iterator[tuple[str, Any]]:
    """(place, row) of a CSV or TSV file with a header line. `;` and tabs are told from commas by the header.

    Lines in another encoding than UTF-8 are decoded by what the first 64 KB are. A quote that is never closed
    swallows lines up to `record_bytes`; then the rest of the file is given up.
    """
    name, reason = encoding.guess(next(chunks(path, lambda p: None, limits), b""))
    if name is None:
        on_bad(Problem(path, "", f"a table in UTF-8 or another known encoding ({reason})", ""))
        return
    codec = "utf-8" if name.startswith(("utf-16", "utf-32")) else name
    csv.field_size_limit(limits.record_bytes)
    decoded = (line.decode(codec, "replace") for _, line in lines(path, on_bad, limits))
    header = next(decoded, "").removeprefix("\ufeff")
    mark = (
        max("\t,;|", key=header.count) if header.count("\t") + header.count(",") + header.count(";") else ","
    )
    names = next(csv.reader([header], delimiter=mark), [])
    reader = csv.reader(decoded, delimiter=mark)
    try:
        for row in reader:
            place = f"line {reader.line_num + 1}"
            if len(row) == len(names):
                yield place, {k: v for k, v in zip(names, row, strict=True) if v}
            elif row:
                expected = f"{len(names)} fields as in the header, not {len(row)}"
                on_bad(Problem(path, place, expected, mark.join(row)[:200]))
    except csv.Error as error:
        on_bad(Problem(path, f"line {reader.line_num + 1}", f"a CSV table ({error})", ""))
