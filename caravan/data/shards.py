"""Token shards: flat little-endian ids, document ends, and a page that says what they are.

`train.bin` holds ids one after another (uint16 up to 65,536 ids, else uint32), `train.ends.npy` where each
document ends, `shards.json` the dtype, the vocabulary size, the counts and the hashes. Nobody has to guess a
dtype or look for an end-of-text id, which may occur inside a text.

Opening compares sizes and the hash of each file's first and last 64 KiB: cheap at any size, and it catches a
truncated, exchanged or appended file. `verify` reads everything.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from caravan.data.tokenizer import Tokenizer
from caravan.types import UserError

CHUNK_BYTES = 4 << 20
"""Text encoded at a time: bounds memory."""
FORMAT = 2
"""Of shards.json. 1 had no hashes and is still read."""
_EDGE = 64 << 10
_BLOCK_TOKENS = 4 << 20


@dataclass(frozen=True, slots=True)
class Shards:
    """One split, memory-mapped. `tokens` [tokens], `ends` int64 [documents], exclusive and ascending."""

    tokens: np.ndarray
    ends: np.ndarray
    vocab_size: int
    utf8_bytes: int

    @classmethod
    def open(cls, folder: Path | str, split: str = "train") -> Shards:
        """Raises UserError if the files do not say the same thing, as far as a glance can tell."""
        folder = Path(folder)
        try:
            page = json.loads((folder / "shards.json").read_text(encoding="utf-8"))
            about = page["splits"][split]
            dtype = np.dtype(page["dtype"]).newbyteorder("<")
            ends = np.load(folder / f"{split}.ends.npy", allow_pickle=False, mmap_mode="r")
            size = (folder / f"{split}.bin").stat().st_size
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{folder} holds no shards of split {split!r}: {error}") from error
        if page.get("version", 1) > FORMAT:
            raise UserError(f"{folder} was written by a newer caravan", "install that one, or make it again")
        if wrong := _disagreement(folder, split, about, size, ends, dtype):
            raise UserError(f"{folder}/{wrong}", "make the shards again; `caravan verify` reads every byte")
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

    def document(self, index: int) -> np.ndarray:
        """The ids of one document, in O(1)."""
        if not 0 <= index < len(self.ends):
            raise IndexError(f"document {index} of {len(self.ends)}")
        return self.tokens[int(self.ends[index - 1]) if index else 0 : int(self.ends[index])]

    def documents(self) -> Iterator[np.ndarray]:
        """The ids of each document, in order."""
        return (self.document(index) for index in range(len(self.ends)))


@dataclass(frozen=True, slots=True)
class Block:
    """Some documents on their way to disk."""

    ids: np.ndarray
    """[tokens], of any integer dtype."""
    lengths: np.ndarray
    """int64 [documents]; a document of no tokens leaves no trace."""
    sizes: np.ndarray
    """int64 [documents]: UTF-8 bytes of the text."""

    def first(self, tokens: int) -> Block:
        """The documents up to the one that reaches so many tokens."""
        stop = int(np.searchsorted(np.cumsum(self.lengths), tokens)) + 1
        if stop >= len(self.lengths):
            return self
        return Block(self.ids[: int(self.lengths[:stop].sum())], self.lengths[:stop], self.sizes[:stop])


def write(
    folder: Path, splits: Mapping[str, Iterable[tuple[list[int], int]]], vocab_size: int
) -> dict[str, Any]:
    """Write every split from (ids, utf8 bytes) per document; returns what shards.json holds."""
    return write_blocks(folder, {name: _blocks(rows) for name, rows in splits.items()}, vocab_size)


def write_blocks(
    folder: Path,
    splits: Mapping[str, Iterable[Block]],
    vocab_size: int,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write every split from blocks of documents; returns what shards.json holds, `about` included.

    Raises UserError for an id beyond the vocabulary. Memory does not grow with the data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    written = {name: _write_split(folder, name, blocks, dtype, vocab_size) for name, blocks in splits.items()}
    page = {"version": FORMAT, "dtype": dtype.name, "vocab_size": vocab_size, "eos_appended": True}
    page |= {**(about or {}), "splits": written, "content_sha256": _content(dtype.name, vocab_size, written)}
    (folder / "shards.json").write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    return page


def verify(folder: Path | str) -> list[str]:
    """Everything that is wrong with a folder of shards, in sentences; nothing if it is sound. Reads all."""
    folder = Path(folder)
    try:
        page = json.loads((folder / "shards.json").read_text(encoding="utf-8"))
        splits, dtype, vocab = page["splits"], page["dtype"], int(page["vocab_size"])
    except (OSError, KeyError, ValueError) as error:
        return [f"shards.json cannot be read: {error}"]
    wrong: list[str] = []
    for split, about in splits.items():
        files = about.get("files", {})
        wrong += [f"{name} has changed" for name, f in files.items() if _digest(folder / name) != f["sha256"]]
        try:
            opened = Shards.open(folder, split)
        except UserError as error:
            wrong.append(str(error))
            continue
        if len(opened.ends) and (int(opened.ends[0]) < 1 or bool(np.any(np.diff(opened.ends) <= 0))):
            wrong.append(f"{split}.ends.npy does not ascend")
        blocks = range(0, len(opened), _BLOCK_TOKENS)
        if any(int(opened.tokens[at : at + _BLOCK_TOKENS].max()) >= vocab for at in blocks):
            wrong.append(f"{split}.bin holds ids beyond the vocabulary of {vocab}")
    if "content_sha256" in page and page["content_sha256"] != _content(dtype, vocab, splits):
        wrong.append("shards.json has changed")
    return wrong


def content_hash(folder: Path | str) -> str:
    """What the shards hold, as 64 hex digits: equal for equal tokens, documents, dtype and vocabulary."""
    return str(json.loads((Path(folder) / "shards.json").read_text(encoding="utf-8"))["content_sha256"])


def encode_documents(texts: Iterable[str], tok: Tokenizer) -> Iterator[tuple[list[int], int]]:
    """(ids with the end-of-text id behind, utf8 bytes) per text, `CHUNK_BYTES` of text at a time."""
    end = [] if tok.eos is None else [tok.eos]
    for chunk in text_chunks(texts):
        for text, ids in zip(chunk, tok.encode_many(chunk), strict=True):
            yield ([*ids, *end] if ids else []), len(text.encode("utf-8", "replace"))


@dataclass(frozen=True)
class Encode:
    """Texts -> block of documents, each with the end-of-text id behind, on one thread: other cores have
    processes of their own. Cheap to send to another process."""

    folder: str
    """Of the tokenizer; every worker must be able to read it."""
    digest: str = ""
    """Of the tokenizer: the same folder may hold another one later."""

    def __call__(self, texts: list[str]) -> Block:
        tok = _tokenizer(self.folder, self.digest)
        with _one_thread():
            rows = tok.encode_many(texts)
        if tok.eos is not None:
            for ids in rows:
                if ids:
                    ids.append(tok.eos)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        flat = np.fromiter(chain.from_iterable(rows), np.uint32, int(lengths.sum()))
        sizes = np.fromiter((len(text.encode("utf-8", "replace")) for text in texts), np.int64, len(texts))
        return Block(flat, lengths, sizes)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library asks at each call
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@functools.lru_cache(maxsize=2)
def _tokenizer(folder: str, digest: str) -> Tokenizer:
    return Tokenizer.load(folder)


def text_chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of at most 1,024 texts and about `CHUNK_BYTES` characters."""
    texts = iter(texts)
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


def _blocks(documents: Iterable[tuple[list[int], int]]) -> Iterator[Block]:
    documents = iter(documents)
    while rows := list(islice(documents, 1024)):
        rows = [row for row in rows if row[0]]
        lengths = np.fromiter((len(ids) for ids, _ in rows), np.int64, len(rows))
        flat = np.fromiter(chain.from_iterable(ids for ids, _ in rows), np.int64, int(lengths.sum()))
        yield Block(flat, lengths, np.fromiter((size for _, size in rows), np.int64, len(rows)))


def _write_split(
    folder: Path, name: str, blocks: Iterable[Block], dtype: np.dtype, vocab_size: int
) -> dict[str, Any]:
    total = documents = utf8_bytes = 0
    raw = folder / f"{name}.ends.raw"
    with open(folder / f"{name}.bin", "wb") as tokens, open(raw, "wb") as ends:
        for block in blocks:
            there = block.lengths > 0
            lengths = block.lengths[there]
            for at in range(0, len(block.ids), _BLOCK_TOKENS):  # a block may be a whole memory-mapped file
                ids = block.ids[at : at + _BLOCK_TOKENS]
                check_ids(int(ids.min()), int(ids.max()), vocab_size)
                tokens.write(np.ascontiguousarray(ids, dtype).tobytes())
            ends.write((np.cumsum(lengths) + total).astype("<i8").tobytes())
            total += len(block.ids)
            documents += len(lengths)
            utf8_bytes += int(block.sizes[there].sum())
    with open(folder / f"{name}.ends.npy", "wb") as file, open(raw, "rb") as ends:
        header = {"descr": "<i8", "fortran_order": False, "shape": (documents,)}
        np.lib.format.write_array_header_1_0(file, header)
        shutil.copyfileobj(ends, file, 1 << 20)
    raw.unlink()
    files = {f: _describe(folder / f) for f in (f"{name}.bin", f"{name}.ends.npy")}
    return {"tokens": total, "documents": documents, "utf8_bytes": utf8_bytes, "files": files}


def check_ids(low: int, high: int, vocab_size: int, file: str = "") -> None:
    """Raise UserError unless the smallest and the largest id (of a file) fit the vocabulary."""
    if high >= vocab_size or low < 0:
        wrong = high if high >= vocab_size else low
        raise UserError(
            f"{file and file + ': '}a token id of {wrong} does not fit a vocabulary of {vocab_size}",
            "tokenizer and vocabulary size do not belong together, or the ids were read with a wrong dtype",
        )


def _disagreement(
    folder: Path, split: str, about: Mapping[str, Any], size: int, ends: np.ndarray, dtype: np.dtype
) -> str | None:
    if size != about["tokens"] * dtype.itemsize or len(ends) != about["documents"]:
        return f"{split}.bin does not match shards.json"
    if len(ends) and int(ends[-1]) != about["tokens"]:
        return f"{split}.ends.npy does not match {split}.bin"
    for name, file in about.get("files", {}).items():
        if _edges(folder / name) != file["edges"]:
            return f"{name} does not match shards.json"
    if "files" not in about and len(ends) and bool(np.any(np.diff(ends) <= 0)):
        return f"{split}.ends.npy does not match {split}.bin"
    return None


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _digest(path), "edges": _edges(path)}


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _edges(path: Path) -> str:
    """Hash of the first and the last 64 KiB of a file and of its size."""
    h = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        h.update(file.read(_EDGE))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _EDGE))
        h.update(file.read(_EDGE) + size.to_bytes(8, "little"))
    return h.hexdigest()


def _content(dtype: str, vocab_size: int, splits: Mapping[str, Any]) -> str:
    files = {name: f["sha256"] for about in splits.values() for name, f in about.get("files", {}).items()}
    said = json.dumps({"dtype": dtype, "vocab_size": vocab_size, "files": files}, sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()
