"""datatrove's tokenised files: `x.ds` holds ids, `x.ds.index` a uint64 end of each document.

The width of an id follows from the two sizes. `x.ds.metadata` (a text for people) and `x.ds.loss` are not
needed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from caravan.data.shardio import TokenFile, check_width, dtype_for, numbers
from caravan.types import UserError

VERSION = 1
SUFFIXES = (".ds",)
_WIDTHS = {2: "uint16", 4: "uint32"}


def detect(path: Path) -> str | None:
    """Any `.ds`."""
    return "a .ds" if path.suffix == ".ds" else None


def read(path: Path, vocab_size: int, dtype: str = "auto") -> TokenFile:
    """Tokens and document ends. Raises UserError where the two files do not fit each other."""
    index = path.with_name(path.name + ".index")
    if not index.exists():
        return TokenFile(numbers(path, dtype_for(vocab_size, dtype)), None)
    ends = np.asarray(numbers(index, "uint64")).astype(np.int64)
    size, total = path.stat().st_size, int(ends[-1]) if len(ends) else 0
    if np.any(np.diff(ends) < 0) or (len(ends) and ends[0] < 0):
        raise UserError(f"{index.name}: document ends do not ascend")
    width = size // total if total else 2
    if width not in _WIDTHS or width * total != size:
        raise UserError(
            f"{path.name} has {size} bytes for the {total} ids of its index", "one of the two is cut off"
        )
    kind = _WIDTHS[width]
    check_width(np.dtype(kind), vocab_size, path)
    ends = np.unique(ends)
    return TokenFile(numbers(path, kind), ends[ends > 0])
