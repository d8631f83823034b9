"""nanoGPT's `train.bin` and `val.bin`: ids and nothing else, uint16 unless the user knows better.

An `.bin` that no other format claims is taken for one. Its documents end with the end-of-text id. `meta.pkl`
is never opened.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from caravan.data.shardio import TokenFile, check_width, numbers

VERSION = 1
SUFFIXES = (".bin",)


def detect(path: Path) -> str | None:
    """Any other `.bin`."""
    return "a .bin without a header" if path.suffix == ".bin" else None


def read(path: Path, vocab_size: int, dtype: str = "auto") -> TokenFile:
    """Every number of the file. Raises UserError where the dtype cannot hold the vocabulary."""
    kind = np.dtype("uint16" if dtype == "auto" else dtype)
    check_width(kind, vocab_size, path)
    return TokenFile(numbers(path, kind), None)
