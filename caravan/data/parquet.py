"""Parquet files, read a few rows at a time in the memory of one row group's pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def opened(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile` of which `iter_batches` holds pages, not the file: as it comes, it
    reads ahead every row group that was asked for and lets go of none until the end (pyarrow 26)."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
