"""Parquet files, read a few rows at a time in the memory of one row group's pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def opened(path: Path, dictionaries: list[str] | None = None, metadata: Any = None) -> Any:
    """A `pyarrow.parquet.ParquetFile` of which `iter_batches` holds pages, not the file: as it comes, it
    reads ahead every row group that was asked for and lets go of none until the end (pyarrow 26). Columns
    named in `dictionaries` come as dictionaries; `metadata` of the same file spares reading it again."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(
        path, read_dictionary=dictionaries, metadata=metadata, pre_buffer=False, buffer_size=1 << 20
    )
