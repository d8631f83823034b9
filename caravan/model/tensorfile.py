"""One safetensors file, read by its header.

Every tensor has a type, a shape and a place, which must agree with each other and with the length of the file
before anything is allocated. Tensors are read when asked for, straight into memory of their own; nothing
stays mapped.

The format: https://github.com/huggingface/safetensors (8 bytes length of the header, JSON header, data).
"""

from __future__ import annotations

import json
import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from caravan.types import UserError

HEADER_BYTES = 100_000_000
"""Longest header that is read."""
PIECE_BYTES = 8 << 20
"""A tensor that changes its type on the way in does so in pieces of this size."""

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """What a header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the head of the file."""
    stop: int


class TensorFile:
    """One safetensors file. Raises UserError naming the file, and the tensor if it is about one.

    `hand` holds the one file that each thread has open: however many files share it, a folder of a thousand
    shards takes no more of the files a process may have open than it has readers.
    """

    def __init__(self, path: Path, hand: threading.local | None = None) -> None:
        self.path = path
        self._hand = threading.local() if hand is None else hand
        self._seen: tuple[int, int] | None = None
        """Size and time of change, when the header was read."""
        self.entries = self._header(os.fstat(self._mine().fileno()).st_size)

    def _damaged(self, why: str) -> UserError:
        return UserError(
            f"{self.path} cannot be read: {why}", "the file is cut short or damaged: fetch it again"
        )

    def _header(self, size: int) -> dict[str, Entry]:
        self._mine().seek(0)
        length = int.from_bytes(self._mine().read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_BYTES):
            raise self._damaged(f"its header should have {length} bytes, the file has {size}")

        def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found = dict(pairs)
            if len(found) < len(pairs):
                twice = next(name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1)
                raise ValueError(f"'{twice}' appears twice")
            return found

        def refuse(word: str) -> Any:
            raise ValueError(f"{word} is no number")

        try:
            text = self._mine().read(length).decode("utf-8")
            header = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._damaged("its header is not a JSON object")
        header.pop("__metadata__", None)
        entries = {key: self._entry(key, value, 8 + length, size) for key, value in header.items()}
        end = 8 + length
        for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != end:
                raise self._damaged(f"tensor '{key}' does not begin where the one before it ends")
            end = entry.stop
        if end != size:
            raise self._damaged(f"its tensors end at byte {end}, the file at {size}")
        return entries

    def _entry(self, key: str, value: Any, base: int, size: int) -> Entry:
        known = isinstance(value, dict) and {"dtype", "shape", "data_offsets"} <= value.keys()
        if not known or not all(
            isinstance(value[name], list) and all(type(n) is int and 0 <= n < 2**63 for n in value[name])
            for name in ("shape", "data_offsets")
        ):
            raise self._damaged(f"tensor '{key}' is described by {str(value)[:100]}")
        if not isinstance(value["dtype"], str) or value["dtype"] not in TYPES:
            raise UserError(f"{self.path}: tensor '{key}' is of type {value['dtype']!r}, which is not read")
        dtype, shape = TYPES[value["dtype"]], tuple(value["shape"])
        if len(value["data_offsets"]) != 2 or len(shape) > 16:
            raise self._damaged(f"tensor '{key}' is described by {str(value)[:100]}")
        start, stop = (base + n for n in value["data_offsets"])
        if start > stop or stop > size:
            raise self._damaged(f"tensor '{key}' lies at bytes {start} to {stop} of {size}")
        if math.prod(shape) * dtype.itemsize != stop - start:
            raise self._damaged(f"tensor '{key}' of shape {shape} does not fill {stop - start} bytes")
        return Entry(dtype, shape, start, stop)

    def read(self, key: str) -> Tensor:
        """A tensor in memory of its own."""
        entry = self.entries[key]
        result = torch.empty(entry.shape, dtype=entry.dtype)
        self._into(result.view(-1), entry.start)
        return result

    def fill(self, key: str, out: Tensor) -> None:
        """Read a tensor into `out` of the same shape, whatever its type, device and strides."""
        entry = self.entries[key]
        assert out.shape == entry.shape, key
        if out.is_floating_point() and not entry.dtype.is_floating_point:
            raise UserError(
                f"{self.path}: tensor '{key}' holds {str(entry.dtype).removeprefix('torch.')}, not weights",
                "quantised weights need a 'quantization_config' in config.json that says what they mean",
            )
        if not out.is_contiguous():
            self._rows(entry, out)
            return
        flat = out.view(-1)
        if entry.dtype == out.dtype and out.device.type == "cpu":
            self._into(flat, entry.start)
            return
        step = PIECE_BYTES // entry.dtype.itemsize
        piece = self._piece(PIECE_BYTES).view(entry.dtype)[:step]
        for at in range(0, flat.numel(), step):
            some = piece[: flat.numel() - at]
            self._into(some, entry.start + at * entry.dtype.itemsize)
            flat[at : at + step].copy_(some)

    def _rows(self, entry: Entry, out: Tensor) -> None:
        """Read as many rows at a time as make a piece into `out`, whose own rows lie anyhow."""
        row = math.prod(entry.shape[1:])
        count = max(1, PIECE_BYTES // max(1, row * entry.dtype.itemsize))
        for at in range(0, entry.shape[0], count):
            some = out[at : at + count]
            piece = self._piece(some.numel() * entry.dtype.itemsize).view(entry.dtype)[: some.numel()]
            self._into(piece, entry.start + at * row * entry.dtype.itemsize)
            some.copy_(piece.view(some.shape))

    def _into(self, flat: Tensor, start: int) -> None:
        if not flat.numel():
            return
        view = flat.view(torch.uint8).numpy().data
        done, file = 0, self._mine()
        file.seek(start)
        while done < len(view):
            count = file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise self._damaged("it became shorter while it was read")
            done += count

    def _piece(self, size: int) -> Tensor:
        """[size] bytes or more, this thread's own and kept from tensor to tensor."""
        held: Tensor | None = getattr(self._hand, "piece", None)
        if held is None or len(held) < size:
            whole = -(-max(size, PIECE_BYTES) // 16) * 16  # numbers of every type fit in
            held = self._hand.piece = torch.empty(whole, dtype=torch.uint8)
        return held

    def _mine(self) -> IO[bytes]:
        """The file, open in this thread: each has its own place in it, and the system reads ahead of each."""
        if getattr(self._hand, "path", None) != self.path:
            self._hand.path = self._hand.file = None  # closes what it held
            try:
                file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (held)
                now = os.fstat(file.fileno())
            except FileNotFoundError:
                raise UserError(f"{self.path} is missing", "the download is incomplete") from None
            except OSError as error:
                why = error.strerror or str(error)
                raise UserError(f"{self.path} cannot be opened: {why}", "look at the disk it is on") from None
            if self._seen is not None and self._seen != (now.st_size, now.st_mtime_ns):
                raise self._damaged("it was changed after its header was read")
            self._seen = (now.st_size, now.st_mtime_ns)
            self._hand.path, self._hand.file = self.path, file
        held: IO[bytes] = self._hand.file
        return held
