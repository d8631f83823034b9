"""Numbers and names in files, one per text, of which memory holds no more than is being looked at.

A corpus of a billion texts has a billion ranks, digests and parents: 8 GB for each column. Here they lie in
files without a name (gone when closed, or when the process ends) and are mapped: what is looked at becomes
memory of this process until the bound, then the pages are given back. They stay in the system's cache as long
as nobody else wants the room, so a small corpus never waits for the disk, and a large one needs no more
memory.

Legend: D rows of a column, P places asked for."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

HELD_BYTES = 1 << 20
"""Of one column that may be mapped in at a time."""
_FAULT_BYTES = 64 << 10
"""The kernel maps up to 16 pages around the one that was asked for."""
_CHUNK = 1 << 14
_BLOCK = 1 << 12


class Column:
    """A growing column of one dtype, `width` numbers per row, in a file of `folder` (None: the system's
    folder for such files)."""

    def __init__(
        self, folder: Path | None, dtype: Any, width: int = 1, held_bytes: int = HELD_BYTES, file: Any = None
    ) -> None:
        self.dtype, self.width = np.dtype(dtype), width
        self._file = file or tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by close())
        self._count = self._touched = self._skip = 0
        self._held = held_bytes
        self._map: mmap.mmap | None = None
        self._first: np.ndarray | None = None  # of every block, for `search`
        self._rows = np.zeros(self._shape(0), self.dtype)

    @classmethod
    def over(cls, path: Path, dtype: Any, width: int, skip_bytes: int) -> Column:
        """A file that is there already, from `skip_bytes` on, to be read only. It stays when closed."""
        out = cls(None, dtype, width, file=open(path, "rb"))  # noqa: SIM115  (closed by close())
        row_bytes = out.dtype.itemsize * width
        out._skip, out._count = skip_bytes, (path.stat().st_size - skip_bytes) // row_bytes
        return out

    @classmethod
    def numbered(cls, folder: Path | None, count: int) -> Column:
        """int64 0, 1, ..., count - 1."""
        out = cls(folder, np.int64)
        for at in range(0, count, _CHUNK):
            out.add(np.arange(at, min(count, at + _CHUNK)))
        return out

    @classmethod
    def filled(cls, folder: Path | None, dtype: Any, count: int) -> Column:
        """Zeros. Written, not left as a hole: a full disk must be an error here and not a signal later."""
        out = cls(folder, dtype)
        for at in range(0, count, _CHUNK):
            out.add(np.zeros(min(count - at, _CHUNK), dtype))
        return out

    def __len__(self) -> int:
        return self._count

    def add(self, values: np.ndarray | Sequence[Any]) -> None:
        """The next rows."""
        rows = np.ascontiguousarray(values, self.dtype)
        rows = rows[:, 0] if rows.shape[1:] == (1,) else rows
        assert rows.shape[1:] == self._shape(0)[1:], "rows of another width"
        self._unmap()
        self._first = None
        self._file.write(rows.tobytes())
        self._count += len(rows)

    def chunks(self, size: int = _CHUNK) -> Iterator[tuple[int, np.ndarray]]:
        """(place of the first, rows) from the beginning."""
        for at in range(0, self._count, size):
            yield at, self[at : at + size]

    def __getitem__(self, where: slice) -> np.ndarray:
        """Rows [start, stop), copied."""
        start, stop, _ = where.indices(self._count)
        out = self._mapped()[start:stop].copy()
        self._trim(out.nbytes)
        return out

    def take(self, places: np.ndarray) -> np.ndarray:
        """Rows at these places, [P] or [P, width]."""
        out = np.empty(self._shape(len(places)), self.dtype)
        for part in self._parts(places):
            out[part] = self._rows[places[part]]
        return out

    def put(self, places: np.ndarray, values: np.ndarray | int) -> None:
        """Write rows at places that are there already; of a place named twice the last counts."""
        values = np.broadcast_to(np.asarray(values, self.dtype), self._shape(len(places)))
        for part in self._parts(places):
            self._rows[places[part]] = values[part]

    def least(self, places: np.ndarray, values: np.ndarray) -> None:
        """Write the smaller of what is there and what is given."""
        for part in self._parts(places):
            np.minimum.at(self._rows, places[part], values[part])

    def count(self, places: np.ndarray) -> None:
        """Add one at every place, as often as it is named."""
        for part in self._parts(places):
            np.add.at(self._rows, places[part], 1)

    def runs(self, places: np.ndarray, count: int) -> np.ndarray:
        """[P, count]: the rows from each place on."""
        out = np.empty((len(places), count), self.dtype)
        steps = np.arange(count)
        for part in self._parts(places):
            out[part] = self._rows[places[part][:, None] + steps]
        return out

    def search(self, values: np.ndarray) -> np.ndarray:
        """int64 [P]: how many rows are not larger than each value. For columns that ascend."""
        if self._first is None:
            firsts = [part[::_BLOCK] for _, part in self.chunks(16 * _BLOCK)]
            self._first = np.concatenate([np.zeros(0, self.dtype), *firsts])
        block = np.searchsorted(self._first, values, side="right") - 1
        out = np.zeros(len(values), np.int64)
        order = np.argsort(block, kind="stable")
        edges = np.flatnonzero(np.diff(block[order], prepend=-2)).tolist()
        for start, stop in pairwise([*edges, len(order)]):
            inside = order[start:stop]
            at = int(block[inside[0]]) * _BLOCK
            if at >= 0:  # else before the first row
                out[inside] = at + np.searchsorted(self[at : at + _BLOCK], values[inside], side="right")
        return out

    def close(self) -> None:
        """The file is gone."""
        self._unmap()
        self._file.close()
        self._count = 0

    def _shape(self, count: int) -> tuple[int, ...]:
        return (count,) if self.width == 1 else (count, self.width)

    def _parts(self, places: np.ndarray) -> Iterator[slice]:
        """Slices of `places` that together touch no more than may be held."""
        self._mapped()
        row_bytes = self.dtype.itemsize * self.width
        for at in range(0, len(places), _CHUNK):
            part = places[at : at + _CHUNK]
            reach = (int(part.max()) - int(part.min()) + 1) * row_bytes + _FAULT_BYTES
            few = (
                len(part) if min(reach, self._count * row_bytes) <= self._held else self._held // _FAULT_BYTES
            )
            for start in range(at, at + len(part), max(1, few)):
                stop = min(start + max(1, few), at + len(part))
                yield slice(start, stop)
                self._trim(min(reach, (stop - start) * _FAULT_BYTES))

    def _mapped(self) -> np.ndarray:
        if self._map is None and self._count:
            self._file.flush()
            access = mmap.ACCESS_WRITE if self._file.writable() else mmap.ACCESS_READ
            self._map = mmap.mmap(self._file.fileno(), 0, access=access)
            rows = np.frombuffer(self._map, self.dtype, self._count * self.width, self._skip)
            self._rows = rows.reshape(self._shape(self._count))
        return self._rows

    def _trim(self, touched: int) -> None:
        """Give the pages back once enough of them may be here; what was written goes to the file."""
        self._touched += touched
        if self._touched > self._held and self._map is not None:
            if self._rows.nbytes > self._held and hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0

    def _unmap(self) -> None:
        if self._map is not None:
            self._rows = np.zeros(self._shape(0), self.dtype)
            self._map.close()
            self._map = None


class Names:
    """Strings in a file, by place."""

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by close())
        self._ends = Column(folder, np.int64)
        self._size = 0

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, names: Iterable[str]) -> None:
        """The next ones."""
        rows = [name.encode("utf-8", "surrogatepass") for name in names]
        self._file.write(b"".join(rows))
        ends = self._size + np.cumsum([len(r) for r in rows], dtype=np.int64)
        self._ends.add(ends)
        self._size = int(ends[-1]) if len(ends) else self._size

    def take(self, places: np.ndarray) -> list[str]:
        """The names at these places."""
        self._file.flush()
        stops = self._ends.take(places).tolist()
        starts = np.where(places > 0, self._ends.take(np.maximum(places - 1, 0)), 0).tolist()
        out = []
        for start, stop in zip(starts, stops, strict=True):
            self._file.seek(start)
            out.append(self._file.read(stop - start).decode("utf-8", "surrogatepass"))
        self._file.seek(0, 2)  # what is added next goes to the end
        return out

    def close(self) -> None:
        """The files are gone."""
        self._file.close()
        self._ends.close()
