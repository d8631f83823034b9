"""OLMo's and dolma's `.npy`: despite the name ids without a header; beside it perhaps documents in `.csv.gz`.

Each line of the csv is `start,end,id,source,location`, in ids. The file does not say its dtype: by default
the narrowest for the vocabulary, as its writer chooses. A file that really is npy is read as such.
"""

from __future__ import annotations

import csv
import gzip
from array import array
from pathlib import Path

import numpy as np

from caravan.data.shardio import TokenFile, check_width, dtype_for, numbers
from caravan.types import UserError

VERSION = 1
SUFFIXES = (".npy",)
_NPY = b"\x93NUMPY"


def detect(path: Path) -> str | None:
    """Any `.npy`, but our own document ends."""
    return "an .npy" if path.suffix == ".npy" and not path.name.endswith(".ends.npy") else None


def read(path: Path, vocab_size: int, dtype: str = "auto") -> TokenFile:
    """Tokens, and document ends where the csv lies beside. Raises UserError where the two disagree."""
    with open(path, "rb") as file:
        real = file.read(len(_NPY)) == _NPY
    if real:
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise UserError(f"{path.name} cannot be read as npy: {error}") from error
        if tokens.ndim != 1:
            raise UserError(f"{path.name} has {tokens.ndim} dimensions; ids lie in one row")
        check_width(tokens.dtype, vocab_size, path)
    else:
        tokens = numbers(path, dtype_for(vocab_size, dtype))
    beside = path.with_suffix(".csv.gz")
    return TokenFile(tokens, _ends(beside, len(tokens)) if beside.exists() else None)


def _ends(path: Path, total: int) -> np.ndarray:
    ends, last = array("q"), 0
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            for row in csv.reader(file):
                start, end = int(row[0]), int(row[1])
                if start != last or end <= start:
                    raise UserError(
                        f"{path.name}: a document from {start} to {end} follows one that ends at {last}"
                    )
                ends.append(end)
                last = end
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"{path.name} cannot be read: {error}") from error
    if last != total:
        raise UserError(f"{path.name} ends at {last}, the tokens at {total}", "one of the two is cut off")
    return np.frombuffer(ends, np.int64) if ends else np.zeros(0, np.int64)
