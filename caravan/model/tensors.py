"""Named tensors in and out of the safetensors files of a folder, whole or in numbered shards.

Shards are opened lazily; saved files are the same bytes for the same tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from caravan.types import UserError

SHARD_BYTES = 5_000_000_000


class TensorFolder(Mapping[str, Tensor]):
    """All tensors of a folder's safetensors files, by name, read when asked for.

    Raises UserError for a folder without safetensors, an index that points outside the folder or at a
    missing file, and a file that is cut short.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.where: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if index.exists() and not single.exists():
            self._read_index(index)
            return
        files = [single] if single.exists() else sorted(self.folder.glob("*.safetensors"))
        if not files:
            unsafe = sorted(p.name for p in self.folder.glob("*.bin")) + sorted(
                p.name for p in self.folder.glob("*.pt")
            )
            raise UserError(
                f"{self.folder} has no .safetensors file",
                f"{unsafe[0]} is a pickle, which can run code: convert it to safetensors first"
                if unsafe
                else "expected model.safetensors",
            )
        for path in files:
            for key in self._file(path.name).keys():  # noqa: SIM118 (not a mapping)
                if key in self.where:
                    raise UserError(
                        f"{path} repeats tensor '{key}' of {self.where[key]}", "remove the stray file"
                    )
                self.where[key] = path.name

    def _read_index(self, index: Path) -> None:
        try:
            self.where = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} is not a safetensors index: {error}") from None
        for name in sorted(set(self.where.values())):
            if Path(name).name != name or name in ("", ".", "..") or not name.endswith(".safetensors"):
                raise UserError(f"{index} names '{name}', which is not a safetensors file of this folder")
            present = set(self._file(name).keys())
            missing = sorted(k for k, v in self.where.items() if v == name and k not in present)
            if missing:
                raise UserError(
                    f"{self.folder / name} lacks tensor '{missing[0]}', which {index.name} promises"
                )

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            try:
                self._open[name] = safe_open(path, framework="pt", device="cpu")
            except FileNotFoundError:
                raise UserError(f"{path} is missing", "the download is incomplete") from None
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} cannot be read: {error}", "the file is cut short or damaged: fetch it again"
                ) from None
        return self._open[name]

    def __getitem__(self, key: str) -> Tensor:
        return self._file(self.where[key]).get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


class Renamed(Mapping[str, Tensor]):
    """The same tensors under other names, still read when asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], name: Callable[[str], str]) -> None:
        self.tensors = tensors
        self.where = {name(key): key for key in tensors}
        assert len(self.where) == len(tensors), "two tensors of one name"

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[self.where[key]]

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
