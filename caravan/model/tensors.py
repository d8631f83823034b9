"""Named tensors in and out of the safetensors files of a folder, whole or in numbered shards.

A file is read by its header: every tensor has a type, a shape and a place, which must agree with each other
and with the length of the file before anything is allocated. Tensors are read when asked for, straight into
memory of their own; nothing stays mapped. Saved files are the same bytes for the same tensors.

The format: https://github.com/huggingface/safetensors (8 bytes length of the header, JSON header, data).
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from caravan.types import UserError

SHARD_BYTES = 5_000_000_000
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
    """One safetensors file. Raises UserError naming the file, and the tensor if it is about one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._opened = threading.local()
            self._opened.file = open(path, "rb", buffering=0)  # noqa: SIM115 (lives as long as self)
            size = path.stat().st_size
        except FileNotFoundError:
            raise UserError(f"{path} is missing", "the download is incomplete") from None
        except OSError as error:
            raise self._damaged(str(error)) from None
        self.entries = self._header(size)

    def _damaged(self, why: str) -> UserError:
        return UserError(
            f"{self.path} cannot be read: {why}", "the file is cut short or damaged: fetch it again"
        )

    def _header(self, size: int) -> dict[str, Entry]:
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
            out.copy_(self.read(key))
            return
        flat = out.view(-1)
        if entry.dtype == out.dtype and out.device.type == "cpu":
            self._into(flat, entry.start)
            return
        step = max(1, PIECE_BYTES // entry.dtype.itemsize)
        piece = torch.empty(min(step, flat.numel()), dtype=entry.dtype)
        for at in range(0, flat.numel(), step):
            some = piece[: flat.numel() - at]
            self._into(some, entry.start + at * entry.dtype.itemsize)
            flat[at : at + step].copy_(some)

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

    def _mine(self) -> IO[bytes]:
        """The file, opened once per thread: each has its own place, and the system reads ahead of each."""
        if not hasattr(self._opened, "file"):
            try:
                self._opened.file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (lives with the thread)
            except OSError as error:
                raise self._damaged(str(error)) from None
        file: IO[bytes] = self._opened.file
        return file


class Tensors(Mapping[str, Tensor]):
    """Named tensors, read when asked for; shapes are known before, or None is."""

    def __contains__(self, key: object) -> bool:
        """Whether there is one of that name; a Mapping would read it to find out."""
        return any(key == name for name in self)

    def shape(self, key: str) -> tuple[int, ...] | None:
        return None

    def place(self, key: str) -> tuple[str, int] | None:
        """File and first byte of a tensor that `fill` reads straight from there, in several threads at once
        if asked; None where filling needs memory of its own."""
        return None

    def fill(self, key: str, out: Tensor) -> None:
        """Write one into `out`, which has its shape."""
        out.copy_(self[key])


class TensorFolder(Tensors):
    """All tensors of a folder's safetensors files, by name.

    Raises UserError for a folder without safetensors, an index that points outside the folder or at a
    missing file, a tensor in two files, and a file that is cut short or says what cannot be.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.where: dict[str, str] = {}
        self._open: dict[str, TensorFile] = {}
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if index.exists() and not single.exists():
            self._read_index(index)
            return
        files = [single] if single.exists() else sorted(self.folder.glob("*.safetensors"))
        if not files:
            unsafe = [p.name for end in ("*.bin", "*.pt", "*.pth") for p in sorted(self.folder.glob(end))]
            raise UserError(
                f"{self.folder} has no .safetensors file",
                f"{unsafe[0]} is a pickle, which can run code: convert it to safetensors first"
                if unsafe
                else "expected model.safetensors",
            )
        for path in files:
            for key in self._file(path.name).entries:
                self._once(key, path.name)

    def _once(self, key: str, name: str) -> None:
        if self.where.get(key, name) != name:
            raise UserError(
                f"{self.folder / name} repeats tensor '{key}' of {self.where[key]}", "remove the stray file"
            )
        self.where[key] = name

    def _read_index(self, index: Path) -> None:
        try:
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self.where = dict(where)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{index} is not a safetensors index: {error}") from None
        for key, name in self.where.items():
            fine = isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
            if not fine or "\0" in name:
                raise UserError(
                    f"{index} names '{name}' for '{key}', which is not a safetensors file of this folder"
                )
        for name in sorted(set(self.where.values())):
            present = self._file(name).entries
            missing = sorted(k for k, v in self.where.items() if v == name and k not in present)
            if missing:
                raise UserError(
                    f"{self.folder / name} lacks tensor '{missing[0]}', which {index.name} promises"
                )
        for name in sorted(set(self.where.values())):
            for key in self._file(name).entries:
                self._once(key, name)

    def _file(self, name: str) -> TensorFile:
        if name not in self._open:
            inside(self.folder, name)
            self._open[name] = TensorFile(self.folder / name)
        return self._open[name]

    def entry(self, key: str) -> Entry:
        """Type, shape and place of a tensor."""
        return self._file(self.where[key]).entries[key]

    def shape(self, key: str) -> tuple[int, ...] | None:
        return self.entry(key).shape

    def place(self, key: str) -> tuple[str, int] | None:
        return self.where[key], self.entry(key).start

    def fill(self, key: str, out: Tensor) -> None:
        self._file(self.where[key]).fill(key, out)

    def __getitem__(self, key: str) -> Tensor:
        return self._file(self.where[key]).read(key)

    def __contains__(self, key: object) -> bool:
        return key in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


def inside(folder: Path, name: str) -> None:
    """Raise UserError for a link that leads out of a folder, unless into the blobs of the Hub's own cache."""
    path = folder / name
    if not path.is_symlink():
        return
    home, target = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"
    if target.is_relative_to(home) or (home.parent.name == "snapshots" and target.is_relative_to(blobs)):
        return
    raise UserError(f"{path} is a link to {target}, outside its folder", "put the file itself there")


class Renamed(Tensors):
    """The same tensors under other names, still read when asked for; with `keys` those alone."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        name: Callable[[str], str] = str,
        keys: Collection[str] | None = None,
    ) -> None:
        chosen = tensors if keys is None else keys
        self.tensors = tensors
        self.where = {name(key): key for key in chosen}
        assert len(self.where) == len(chosen), "two tensors of one name"

    def shape(self, key: str) -> tuple[int, ...] | None:
        return self.tensors.shape(self.where[key]) if isinstance(self.tensors, Tensors) else None

    def place(self, key: str) -> tuple[str, int] | None:
        return self.tensors.place(self.where[key]) if isinstance(self.tensors, Tensors) else None

    def fill(self, key: str, out: Tensor) -> None:
        if isinstance(self.tensors, Tensors):
            self.tensors.fill(self.where[key], out)
        else:
            out.copy_(self.tensors[self.where[key]])

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[self.where[key]]

    def __contains__(self, key: object) -> bool:
        return key in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Sorted, indented JSON with a final newline: the same bytes for the same value."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """model.safetensors, or numbered shards with an index when there are more than `shard_bytes`."""
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name in sorted(tensors):
        n = tensors[name].numel() * tensors[name].element_size()
        if shards[-1] and size + n > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensors[name]
        size += n
        total += n
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where}
    )


def stream_tensors(
    wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    make: Callable[[str], Tensor],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """As `write_tensors`, but each tensor is made by make(name), written and forgotten: memory holds one."""
    shards: list[list[str]] = [[]]
    size = total = 0
    for name in sorted(wanted):
        n = math.prod(wanted[name][1]) * wanted[name][0].itemsize
        if shards[-1] and size + n > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + n, total + n
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        _stream(folder / file, {name: wanted[name] for name in names}, make)
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(folder / "model.safetensors.index.json", index)


def _stream(
    path: Path, wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], make: Callable[[str], Tensor]
) -> None:
    # wide types first, as safetensors itself does, so that every tensor is aligned to its type
    order = sorted(wanted, key=lambda name: (-wanted[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        dtype, shape = wanted[name]
        stop = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            made = make(name).detach().to("cpu").contiguous()
            assert (made.dtype, tuple(made.shape)) == (wanted[name][0], tuple(wanted[name][1])), name
            if made.numel():
                file.write(made.view(-1).view(torch.uint8).numpy().data)
