"""Megatron-LM's indexed data set: `x.bin` holds the ids, `x.idx` says where sequences and documents lie.

The index has two versions: `MMIDIDX` (memory-mapped; today's) and `TNTIDX` (the older cached and lazy
one, taken over from fairseq). All numbers are little-endian.

    MMIDIDX\\0\\0  u64 version 1  u8 dtype  u64 S sequences  u64 D entries
                 i32 length [S]  i64 byte offset [S]  i64 first sequence of each document [D] (starts with 0)
    TNTIDX\\0\\0   u64 version 1  u64 dtype  u64 bytes per id  u64 S  u64 lengths  u64 D
                 i64 dims [S+1]  i64 offset in ids [S+1]  i64 length [lengths]  i64 document [D]

dtype: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16; 6 and 7 are floats and refused.
Left out: multimodal modes, which may follow the documents.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from caravan.data.shardio import TokenFile, check_width, numbers
from caravan.types import UserError

VERSION = 1
SUFFIXES = (".bin",)
MAPPED, CACHED = b"MMIDIDX\0\0", b"TNTIDX\0\0"
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


def detect(path: Path) -> str | None:
    """A `.bin` with its `.idx` beside it."""
    return "an .idx lies beside it" if path.suffix == ".bin" and path.with_suffix(".idx").exists() else None


def read(path: Path, vocab_size: int, dtype: str = "auto") -> TokenFile:
    """Tokens and document ends. Raises UserError for a wrong magic, a cut-off file, another order."""
    index = path.with_suffix(".idx")
    try:
        with open(index, "rb") as file:
            kind, starts, lengths, documents = _index(file, index.name)
    except FileNotFoundError as error:
        raise UserError(
            f"{path.name} has no {index.name} beside it", "Megatron data are two files"
        ) from error
    check_width(kind, vocab_size, path)
    tokens = numbers(path, kind)
    total = int(lengths.sum())
    expected = np.cumsum(lengths) - lengths
    if total != len(tokens):
        raise UserError(
            f"{path.name} holds {len(tokens)} ids, its index {total}", "one of the two files is cut off"
        )
    if not np.array_equal(starts, expected):
        raise UserError(f"{index.name} puts sequences in another order than {path.name}", "merge it anew")
    if (
        len(documents) < 1
        or documents[0] != 0
        or documents[-1] != len(lengths)
        or np.any(np.diff(documents) < 0)
    ):
        raise UserError(f"{index.name}: its documents are not those of its {len(lengths)} sequences")
    sequence_ends = np.concatenate([[0], np.cumsum(lengths)])
    ends = np.unique(sequence_ends[documents[1:]])
    return TokenFile(tokens, ends[ends > 0].astype(np.int64))


def _index(file: BinaryIO, name: str) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """(dtype, first id of each sequence, lengths, documents)."""
    magic = file.read(9)
    if magic == MAPPED:
        version, code = struct.unpack("<QB", _take(file, 9, name))
        _known(version, code, name)
        sequences, entries = struct.unpack("<QQ", _take(file, 16, name))
        kind = np.dtype(DTYPES[code])
        lengths = _array(file, "<i4", sequences, name).astype(np.int64)
        starts = _array(file, "<i8", sequences, name) // kind.itemsize
        return kind, starts, lengths, _array(file, "<i8", entries, name)
    if magic[:8] == CACHED:
        file.seek(8)
        version, code, width = struct.unpack("<QQQ", _take(file, 24, name))
        _known(version, code, name)
        sequences, sizes, entries = struct.unpack("<QQQ", _take(file, 24, name))
        kind = np.dtype(DTYPES[code])
        if width != kind.itemsize or sizes != sequences:
            raise UserError(f"{name} is damaged: {width} bytes per {kind.name}, {sizes} sizes of {sequences}")
        _array(file, "<i8", sequences + 1, name)
        starts = _array(file, "<i8", sequences + 1, name)[:-1]
        lengths = _array(file, "<i8", sizes, name)
        return kind, starts, lengths, _array(file, "<i8", entries, name)
    raise UserError(
        f"{name} is no Megatron index: it begins with {magic[:9]!r}", "an index begins with MMIDIDX or TNTIDX"
    )


def _known(version: int, code: int, name: str) -> None:
    if version != 1:
        raise UserError(f"{name} is of version {version}", "version 1 is known")
    if code not in DTYPES:
        raise UserError(f"{name} says dtype {code}", f"known: {DTYPES}")


def _take(file: BinaryIO, size: int, name: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise UserError(f"{name} is cut off", "copy or make it again")
    return data


def _array(file: BinaryIO, dtype: str, count: int, name: str) -> np.ndarray:
    size = np.dtype(dtype).itemsize * count
    at = file.tell()
    if file.seek(0, 2) - at < size:  # before reading: a damaged count must not ask for memory
        raise UserError(f"{name} is cut off", "copy or make it again")
    file.seek(at)
    return np.frombuffer(_take(file, size, name), dtype)


def write(prefix: Path, documents: Iterable[np.ndarray], vocab_size: int) -> tuple[Path, Path]:
    """Write `prefix`.bin and `prefix`.idx (`MMIDIDX`), one sequence per document; returns the two paths.

    uint16 while every id fits into it as Megatron sees it (vocabulary below 65,500), else int32.
    """
    kind, code = (np.dtype("<u2"), 8) if vocab_size < 65500 else (np.dtype("<i4"), 4)
    tokens, index = prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")
    lengths: list[int] = []
    with open(tokens, "wb") as file:
        for ids in documents:
            if len(ids) and int(ids.max()) >= vocab_size:
                raise UserError(f"a token id of {int(ids.max())} does not fit a vocabulary of {vocab_size}")
            file.write(np.ascontiguousarray(ids, kind).tobytes())
            lengths.append(len(ids))
    sizes = np.asarray(lengths, "<i4")
    starts = (np.cumsum(sizes, dtype=np.int64) - sizes) * kind.itemsize
    with open(index, "wb") as file:
        file.write(MAPPED + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1))
        file.write(sizes.tobytes() + starts.astype("<i8").tobytes())
        file.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
    return tokens, index
