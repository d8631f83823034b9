"""Rows of tables: Parquet, Arrow (file and stream), CSV and TSV, a batch at a time.

A table can be a bomb too: a long text kept once in a dictionary stands in every row at the cost of a few
bits. So the longest text of a dictionary decides how many rows are read at a time, and what they hold is
counted.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from caravan.data.extract import encoding
from caravan.data.formats._packed import Limits, OnBad, Problem, chunks, lines
from caravan.data.parquet import opened

ARROW = (".arrow", ".feather", ".ipc")
TABLES = (".parquet", ".csv", ".tsv", *ARROW)
_ROWS = 256
_HELD = 32 << 20
"""Rows are taken apart in batches of about so many bytes (one row may be longer)."""
_END = b"\xff\xff\xff\xff\0\0\0\0"
"""Ends an Arrow stream; one that was cut between two batches is told by its absence."""


def parquet(path: Path, on_bad: OnBad, limits: Limits) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row; empty cells are left out."""
    import pyarrow
    import pyarrow.parquet

    def batches() -> Iterator[Any]:
        with opened(path) as file:
            for group in range(file.metadata.num_row_groups):
                rows, lists = _at_a_time(path, file.metadata, group, limits)
                with opened(path, lists, file.metadata) as again:
                    yield from again.iter_batches(batch_size=rows, row_groups=[group])

    try:
        yield from _rows(batches(), path, on_bad, limits)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        on_bad(Problem(path, "", f"a parquet file ({str(error)[:200]})", ""))


def _at_a_time(path: Path, metadata: Any, group: int, limits: Limits) -> tuple[int, list[str]]:
    """How many rows of a row group hold about 32 MB, and the columns of lists to be read as dictionaries:
    those with a text over a megabyte, since one row may hold it any number of times.

    ValueError if the group is a bomb by its own account.
    """
    about = metadata.row_group(group)
    columns = [about.column(i) for i in range(about.num_columns)]
    size = sum(c.total_uncompressed_size for c in columns)
    packed = sum(c.total_compressed_size for c in columns)
    if size > max(limits.ratio_free_bytes, limits.ratio * packed):
        raise ValueError(f"it unpacks to more than {limits.ratio} times its size")
    if size * max(1, about.num_rows) <= _HELD and not any("." in c.path_in_schema for c in columns):
        return _ROWS, []  # even if every row held all there is
    kept = [
        (c.path_in_schema, metadata.schema.column(i).max_repetition_level > 0)
        for i, c in enumerate(columns)
        if c.has_dictionary_page and metadata.schema.column(i).logical_type.type in ("STRING", "NONE")
        and c.physical_type == "BYTE_ARRAY"
    ]  # fmt: skip
    longest, lists = 0, []
    for name, repeated in kept:
        with opened(path, [name], metadata) as file:  # rows bring their dictionary along
            first = next(file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[name]), None)
        here = _longest(first.column(0)) if first else 0
        longest = max(longest, here)
        lists += [name] if repeated and here > 1 << 20 else []
    return max(1, min(_ROWS, _HELD // max(longest, size // max(1, about.num_rows), 1))), lists


def _longest(array: Any) -> int:
    """The longest text of the dictionaries in a column (bytes)."""
    from pyarrow import compute, types

    if types.is_dictionary(array.type):
        return compute.max(compute.binary_length(array.dictionary)).as_py() or 0
    if types.is_struct(array.type):
        return max((_longest(array.field(i)) for i in range(array.type.num_fields)), default=0)
    return _longest(array.values) if types.is_nested(array.type) else 0


def arrow(path: Path, on_bad: OnBad, limits: Limits) -> Iterator[tuple[str, Any]]:
    """(place, row) of an Arrow file or stream (what `datasets` keeps in its cache)."""
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.OSFile(str(path)) as file:
            yield from _rows(_arrow_batches(file, pyarrow.ipc), path, on_bad, limits)
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


def _rows(batches: Iterator[Any], path: Path, on_bad: OnBad, limits: Limits) -> Iterator[tuple[str, Any]]:
    """Rows as dicts with their places. Too long a row goes to `on_bad`, and so does the rest of a file that
    holds `limits.ratio` times its size."""
    number = given = 0
    most = max(limits.ratio_free_bytes, limits.ratio * path.stat().st_size)
    for part, size in chain.from_iterable(map(_parts, batches)):
        place, given = f"record {number + 1}", given + size
        if given > most:
            expected = f"a file that does not unpack to more than {limits.ratio} times its size"
            on_bad(Problem(path, place, expected, ""))
            return
        if size > limits.record_bytes and part.num_rows == 1:
            on_bad(Problem(path, place, f"a record of at most {limits.record_bytes:,} bytes", ""))
            number += 1
            continue
        for row in _taken_apart(part):
            number += 1
            yield f"record {number}", row


def _parts(batch: Any) -> Iterator[tuple[Any, int]]:
    """(slice of a batch, its bytes written out): at most 256 rows and 32 MB, or a single row."""
    sizes_B = sum(map(_sizes, batch.columns), np.zeros(batch.num_rows, np.int64))
    ends = np.concatenate([[0], np.cumsum(sizes_B)])
    start = 0
    while start < batch.num_rows:
        fits = int(np.searchsorted(ends, ends[start] + _HELD, "right")) - 1
        stop = max(start + 1, min(fits, start + _ROWS))
        yield batch.slice(start, stop - start), int(ends[stop] - ends[start])
        start = stop


def _sizes(array: Any) -> np.ndarray:
    """Bytes of each cell of a column, with its dictionary written out. int64 [rows]"""
    from pyarrow import compute, types

    kind = array.type
    if types.is_dictionary(kind) and _of_bytes(kind.value_type):
        lengths = compute.take(compute.binary_length(array.dictionary), array.indices)
    elif _of_bytes(kind):
        lengths = compute.binary_length(array)
    elif types.is_struct(kind):
        return sum(map(_sizes, array.flatten()), np.zeros(len(array), np.int64))
    elif types.is_list(kind) or types.is_large_list(kind):
        inner = np.concatenate([[0], np.cumsum(_sizes(array.flatten()))])
        ends = np.cumsum(_numbers(compute.list_value_length(array)))
        return np.diff(inner[np.concatenate([[0], ends])])
    else:
        return np.full(len(array), array.nbytes // max(1, len(array)), np.int64)
    return _numbers(lengths)


def _numbers(lengths: Any) -> np.ndarray:
    return lengths.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def _of_bytes(kind: Any) -> bool:
    from pyarrow import types

    return bool(
        types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind)
        or types.is_large_binary(kind)
    )  # fmt: skip


def _taken_apart(batch: Any) -> Iterator[Any]:
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
