"""Token files that other programs wrote: one module per format, found by looking at the file.

    caravan shards --raw FOLDER --tokenizer TOKENIZER

Every module offers `detect(path) -> reason | None`, `read(path, vocab_size, dtype) -> TokenFile`, the
`SUFFIXES` of its files and a `VERSION`. A file is memory-mapped, never loaded; whether its ids fit the
vocabulary is seen while they are copied.
The folder is the registry: a new format is a new file.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np

from caravan.types import UserError

ORDER = ("megatron", "datatrove", "llmc", "olmo", "nanogpt")
"""Formats that say what they are come first; nanoGPT's bare numbers come last."""
HELDOUT = ("heldout", "valid", "val", "test", "dev")


@dataclass(frozen=True, slots=True)
class TokenFile:
    """Tokens of one file and what it says about its documents."""

    tokens: np.ndarray
    """[tokens], memory-mapped, of the integer dtype on disk."""
    ends: np.ndarray | None
    """int64 [documents], exclusive and ascending; None: the file does not say where documents end."""
    separator: str = "end"
    """Without `ends`: where the writer puts the end-of-text id in a document: `end` or `start`."""


@cache
def names() -> tuple[str, ...]:
    """Every format there is, in the order of asking."""
    there = {p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_")}
    return (*(n for n in ORDER if n in there), *sorted(there - set(ORDER)))


def module(name: str) -> ModuleType:
    """The module of one format; UserError with the names there are."""
    if name not in names():
        raise UserError(f"there is no token format `{name}`", f"there are: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def detect(path: Path) -> tuple[str, str] | None:
    """(format, why) of a file; None for one that belongs to another file or is no token file."""
    for name in names():
        if reason := module(name).detect(path):
            return name, reason
    return None


def find(root: Path, chosen: str = "auto") -> Iterator[tuple[Path, str, str]]:
    """(file, format, why) of all token files below a folder, in the order of their names."""
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    for path in files:
        if chosen == "auto":
            if found := detect(path):
                yield path, *found
        elif path.suffix in module(chosen).SUFFIXES:
            yield path, chosen, "asked for"


def split_of(path: Path) -> str:
    """`heldout` for a file that calls itself validation or test data, `train` for one that says so, else
    nothing."""
    words = path.stem.lower().replace("-", "_").replace(".", "_").split("_")
    return "heldout" if any(w in HELDOUT for w in words) else "train" if "train" in words else ""


def numbers(path: Path, dtype: str | np.dtype, offset: int = 0) -> np.ndarray:
    """The rest of a file behind `offset` bytes as numbers, memory-mapped. UserError if they do not come out
    even."""
    kind = np.dtype(dtype).newbyteorder("<")
    size = path.stat().st_size - offset
    if size < 0 or size % kind.itemsize:
        raise UserError(
            f"{path.name}: {size} bytes are no whole number of {kind.name} ids",
            "the file is cut off, or its ids have another dtype",
        )
    return np.memmap(path, kind, "r", offset) if size else np.zeros(0, kind)


def dtype_for(vocab_size: int, asked: str) -> str:
    """The dtype asked for; `auto` is uint16 where the vocabulary fits into it. UserError if it is too
    narrow."""
    if asked == "auto":
        return "uint16" if vocab_size <= 1 << 16 else "uint32"
    check_width(np.dtype(asked), vocab_size)
    return asked


def check_width(dtype: np.dtype, vocab_size: int, path: Path | None = None) -> None:
    """Raise UserError where a dtype cannot hold every id."""
    if dtype.kind not in "iu":
        raise UserError(f"{path.name if path else dtype}: token ids are whole numbers, not {dtype.name}")
    if np.iinfo(dtype).max < vocab_size - 1:
        where = f"{path.name}: " if path else ""
        raise UserError(
            f"{where}{dtype.name} is too narrow for a vocabulary of {vocab_size}",
            "the file was made with another tokenizer, or give --dtype",
        )
