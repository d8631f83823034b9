"""Named tensors in and out of the safetensors files of a folder, whole or in numbered shards.

Tensors are read when asked for (`tensorfile.py`). Saved files are the same bytes for the same tensors.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from caravan.model.tensorfile import NAMES, Entry, TensorFile
from caravan.types import UserError

SHARD_BYTES = 5_000_000_000


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
        self._files: dict[str, TensorFile] = {}
        self._hand = threading.local()
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
        if name not in self._files:
            inside(self.folder, name)
            self._files[name] = TensorFile(self.folder / name, self._hand)
        return self._files[name]

    def entry(self, key: str) -> Entry:
        """Type, shape and place of a tensor."""
        return self._file(self.where[key]).entries[key]

    def shape(self, key: str) -> tuple[int, ...] | None:
        return self.entry(key).shape

    def kind(self, key: str) -> torch.dtype:
        return self.entry(key).dtype

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
