"""llm.c's shards: 256 int32 of header, then ids.

    header[0] magic  20240520 with version 1: uint16;  20240801 with version 7: uint32
    header[1] version, header[2] number of ids, the rest 0

Its documents begin with the end-of-text id; there is no index.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from caravan.data.shardio import TokenFile, check_width, numbers
from caravan.types import UserError

VERSION = 1
SUFFIXES = (".bin",)
HEADER_BYTES = 1024
KINDS = {20240520: (1, "uint16"), 20240801: (7, "uint32")}


def detect(path: Path) -> str | None:
    """A `.bin` with one of the two magic numbers."""
    if path.suffix != ".bin":
        return None
    with open(path, "rb") as file:
        magic = int.from_bytes(file.read(4), "little")
    return f"it begins with {magic}" if magic in KINDS else None


def read(path: Path, vocab_size: int, dtype: str = "auto") -> TokenFile:
    """Tokens behind the header. Raises UserError for a wrong magic or version, or another number of ids."""
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        raise UserError(
            f"{path.name} is too short for the header of llm.c", "it is cut off or something else"
        )
    magic, version, count = (int(n) for n in np.frombuffer(header, "<i4", 3))
    if magic not in KINDS:
        raise UserError(f"{path.name} begins with {magic}, not with one of llm.c's {list(KINDS)}")
    wanted, kind = KINDS[magic]
    if version != wanted:
        raise UserError(f"{path.name} is of version {version}; {magic} goes with version {wanted}")
    check_width(np.dtype(kind), vocab_size, path)
    tokens = numbers(path, kind, HEADER_BYTES)
    if len(tokens) != count:
        raise UserError(f"{path.name} holds {len(tokens)} ids and says {count}", "it is cut off")
    return TokenFile(tokens, None, "start")
