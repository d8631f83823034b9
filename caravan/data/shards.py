"""Token shards: flat little-endian ids, document ends, and a page that says what they are.

`train.bin` holds ids one after another (uint16 up to 65,536 ids, else uint32), `train.ends.npy` where each
document ends, `shards.json` the dtype, the vocabulary size and the counts. Nobody has to guess a dtype or
look for an end-of-text id, which may occur inside a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from caravan.data.tokenizer import Tokenizer
from caravan.types import UserError

CHUNK_BYTES = 4 << 20
"""Text encoded at a time: bounds memory."""


@dataclass(frozen=True, slots=True)
class Shards:
    """One split, memory-mapped. `tokens` [tokens], `ends` int64 [documents], exclusive and ascending."""

    tokens: np.ndarray
    ends: np.ndarray
    vocab_size: int
    utf8_bytes: int

    @classmethod
    def open(cls, folder: Path | str, split: str = "train") -> Shards:
        """Raises UserError if the files do not say the same thing."""
        folder = Path(folder)
        try:
            page = json.loads((folder / "shards.json").read_text(encoding="utf-8"))
            about = page["splits"][split]
            dtype = np.dtype(page["dtype"]).newbyteorder("<")
            ends = np.load(folder / f"{split}.ends.npy", allow_pickle=False)
            size = (folder / f"{split}.bin").stat().st_size
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{folder} holds no shards of split {split!r}: {error}") from error
        if size != about["tokens"] * dtype.itemsize or len(ends) != about["documents"]:
            raise UserError(f"{folder}/{split}.bin does not match shards.json", "make the shards again")
        if len(ends) and (int(ends[-1]) != about["tokens"] or bool(np.any(np.diff(ends) <= 0))):
            raise UserError(f"{folder}/{split}.ends.npy does not match {split}.bin", "make the shards again")
        empty = np.zeros(0, dtype)
        tokens = np.memmap(folder / f"{split}.bin", dtype=dtype, mode="r") if size else empty
        return cls(tokens, ends, int(page["vocab_size"]), int(about["utf8_bytes"]))

    def __len__(self) -> int:
        return len(self.tokens)

    def segments(self, start: int, stop: int) -> tuple[int, ...]:
        """Lengths of the pieces of documents in tokens [start, stop), in order; they sum to stop - start."""
        first, last = np.searchsorted(self.ends, [start, stop], side="right")
        cuts = self.ends[first:last]
        edges = [start, *(int(c) for c in cuts if start < c < stop), stop]
        return tuple(b - a for a, b in pairwise(edges) if b > a)

    def documents(self) -> Iterator[np.ndarray]:
        """The ids of each document, in order."""
        start = 0
        for end in self.ends:
            yield self.tokens[start : int(end)]
            start = int(end)


def write(
    folder: Path, splits: Mapping[str, Iterable[tuple[list[int], int]]], vocab_size: int
) -> dict[str, Any]:
    """Write every split from (ids, utf8 bytes) per document; returns what shards.json holds."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    about = {
        name: _write_split(folder, name, documents, dtype, vocab_size) for name, documents in splits.items()
    }
    page = {"dtype": dtype.name, "vocab_size": vocab_size, "eos_appended": True, "splits": about}
    (folder / "shards.json").write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    return page


def _write_split(
    folder: Path, name: str, documents: Iterable[tuple[list[int], int]], dtype: np.dtype, vocab_size: int
) -> dict[str, int]:
    ends: list[int] = []
    total = utf8_bytes = 0
    with open(folder / f"{name}.bin", "wb") as file:
        for ids, size in documents:
            if not ids:
                continue
            row = np.asarray(ids, dtype=np.int64)
            if int(row.max()) >= vocab_size or int(row.min()) < 0:
                raise UserError(
                    f"a token id of {int(row.max())} does not fit a vocabulary of {vocab_size}",
                    "tokenizer and vocabulary size do not belong together",
                )
            file.write(row.astype(dtype).tobytes())
            total += len(row)
            utf8_bytes += size
            ends.append(total)
    np.save(folder / f"{name}.ends.npy", np.asarray(ends, dtype=np.int64), allow_pickle=False)
    return {"tokens": total, "documents": len(ends), "utf8_bytes": utf8_bytes}


def encode_documents(texts: Iterable[str], tok: Tokenizer) -> Iterator[tuple[list[int], int]]:
    """(ids with the end-of-text id behind, utf8 bytes) per text, `CHUNK_BYTES` of text at a time."""
    end = [] if tok.eos is None else [tok.eos]
    for chunk in _chunks(iter(texts)):
        for text, ids in zip(chunk, tok.encode_many(chunk), strict=True):
            yield ([*ids, *end] if ids else []), len(text.encode("utf-8", "replace"))


def _chunks(texts: Iterator[str]) -> Iterator[list[str]]:
    while True:
        chunk: list[str] = []
        size = 0
        for text in islice(texts, 1024):
            chunk.append(text)
            size += len(text)
            if size >= CHUNK_BYTES:
                break
        if not chunk:
            return
        yield chunk
