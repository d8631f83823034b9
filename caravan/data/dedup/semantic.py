"""Texts that say the same: SemDeDup (Abbas et al. 2023, arXiv 2303.09540) on given embeddings.

Embeddings are normalised and grouped by spherical k-means, so that only texts of one group are compared; a
text goes if a better ranked one of its group (see `keepers`) has a cosine of at least the threshold. Two
texts alike but in different groups are missed: fewer groups find more and cost more. Their paper keeps the
text farthest from the centre; here it is the common rule.

Everything is done in the order of the texts' hashes and in blocks of fixed size, so that neither shards, nor
their order, nor what may be held in memory change anything. Memory holds the centres and a few blocks of
rows; embeddings, groups and the order of the texts lie on disk.

Legend: D texts, E width of an embedding, C groups, P places asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from caravan.data import parquet
from caravan.data.columns import Column, Names
from caravan.data.dedup.exact import SameKey
from caravan.data.dedup.keepers import Ranks
from caravan.types import UserError

_BLOCK = 1024
_SAMPLE = 256
"""Texts per group on which centres are found."""

Found = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(texts that go int64, the text each resembles most int64, their cosine float32)."""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One row per text, on disk."""

    rows: Column
    at: Column | None = None
    """int64: which row is whose text's, if they are not in the order of the texts."""

    def __len__(self) -> int:
        return len(self.rows if self.at is None else self.at)

    def take(self, places: np.ndarray) -> np.ndarray:
        """[P, E]: embeddings of these texts."""
        found = self.rows.take(places if self.at is None else self.at.take(places))
        return found.reshape(len(places), -1)

    def close(self) -> None:
        """Remove the files."""
        self.rows.close()
        if self.at is not None:
            self.at.close()


def similar(
    embeddings: Embeddings, ranks: Ranks, cosine: float, groups: int = 0, rounds: int = 10,
    folder: Path | None = None, memory_bytes: int = 1 << 30,
) -> Iterator[Found]:  # fmt: skip
    """What goes, group by group. `groups` 0 takes the square root of the number of texts over 4, at least
    one. `memory_bytes` bounds sorting and changes nothing."""
    if len(embeddings) != len(ranks):
        raise UserError(
            f"{len(embeddings):,} embeddings for {len(ranks):,} texts", "one row per text, in its order"
        )
    if len(ranks) < 2:
        return
    order = Column(folder, np.int64)
    for part in ranks.by_hash(memory_bytes):
        order.add(part)
    groups = min(groups or max(1, int(np.sqrt(len(order)) / 4)), len(order))
    centres = _centres(embeddings, order, groups, rounds, folder)
    members, edges = _grouped(embeddings, order, centres, folder)
    for first, last in pairwise(edges.tolist()):
        yield from _within(embeddings, members[first:last], ranks, cosine, folder)
    members.close()
    order.close()


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    if not np.isfinite(rows).all():
        raise UserError("an embedding holds a number that is not finite")
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _blocks(count: int) -> Iterator[slice]:
    return (slice(at, min(at + _BLOCK, count)) for at in range(0, count, _BLOCK))


def _kept(embeddings: Embeddings, places: Column | np.ndarray, folder: Path | None) -> Column:
    """float32: embeddings of these texts, normalised."""
    out: Column | None = None
    for block in _blocks(len(places)):
        rows = _unit(embeddings.take(places[block]))
        out = Column(folder, np.float32, rows.shape[1]) if out is None else out
        out.add(rows)
    assert out is not None, "no texts"
    return out


def _centres(
    embeddings: Embeddings, order: Column, groups: int, rounds: int, folder: Path | None
) -> np.ndarray:
    """float32 [C, E], found on the first texts by hash: hashes are random, so these are a fair draw."""
    sample = _kept(embeddings, order[: _SAMPLE * groups], folder)
    centres = sample[:groups].reshape(groups, -1)
    for _ in range(rounds if groups > 1 else 0):
        total, count = np.zeros_like(centres, np.float64), np.zeros(groups, np.int64)
        for block in _blocks(len(sample)):
            rows = sample[block].reshape(-1, sample.width)
            nearest = (rows @ centres.T).argmax(axis=1)
            np.add.at(total, nearest, rows)
            count += np.bincount(nearest, minlength=groups)
        centres[count > 0] = _unit(total[count > 0])  # an empty group keeps its centre
    sample.close()
    return centres


def _grouped(
    embeddings: Embeddings, order: Column, centres: np.ndarray, folder: Path | None
) -> tuple[Column, np.ndarray]:
    """(texts group by group, in `order` within each; int64 [C + 1]: where groups begin and end)."""
    member, size = Column(folder, np.int64), np.zeros(len(centres), np.int64)
    for block in _blocks(len(order)):
        nearest = (_unit(embeddings.take(order[block])) @ centres.T).argmax(axis=1)
        member.add(nearest)
        size += np.bincount(nearest, minlength=len(centres))
    edges = np.concatenate([[0], np.cumsum(size)])
    free, out = edges[:-1].copy(), Column.filled(folder, np.int64, len(order))
    for block in _blocks(len(member)):
        group = member[block]
        sort = np.argsort(group, kind="stable")
        group = group[sort]
        before = np.arange(len(group)) - np.searchsorted(group, group)  # of its group in this block
        out.put(free[group] + before, order[block][sort])
        free += np.bincount(group, minlength=len(free))
    member.close()
    return out, edges


def _within(
    embeddings: Embeddings, places: np.ndarray, ranks: Ranks, cosine: float, folder: Path | None
) -> Iterator[Found]:
    """As `similar`, for the texts of one group."""
    if len(places) < 2:
        return
    places = places[ranks.order(places)]  # best ranked first: only what came before is looked at
    rows = _kept(embeddings, places, folder)
    for block in _blocks(len(places)):
        own = rows[block].reshape(-1, rows.width)
        best, value = np.zeros(len(own), np.int64), np.full(len(own), -2.0, np.float32)
        for other in _blocks(block.stop):
            close = own @ rows[other].reshape(-1, rows.width).T
            if other.start == block.start:
                close[np.triu_indices(len(own))] = -2.0
            top = close.argmax(axis=1)
            found = close[np.arange(len(own)), top]
            better = found > value
            best[better], value[better] = other.start + top[better], found[better]
        gone = np.flatnonzero(value >= cosine - 1e-6)
        yield places[block.start + gone], places[best[gone]], value[gone]
    rows.close()


def read(path: Path, ids: Names, folder: Path | None = None, memory_bytes: int = 1 << 30) -> Embeddings:
    """Embeddings of a .npy file (one row per text, in order) or a .parquet file with columns `id` and
    `embedding` (in any order; of rows with one id the last). Raises UserError if a text has none."""
    if path.is_dir():
        files = sorted([*path.glob("*.npy"), *path.glob("*.parquet")])
        if len(files) != 1:
            raise UserError(f"expected one .npy or .parquet file in {path}, found {len(files)}")
        path = files[0]
    return _table(path, len(ids), folder) if path.suffix == ".npy" else _rows(path, ids, folder, memory_bytes)


def _table(path: Path, count: int, folder: Path | None) -> Embeddings:
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if table.ndim != 2 or len(table) != count or table.dtype.kind != "f":
        raise UserError(
            f"{path.name} holds {table.dtype} {table.shape}, not one row of floats for each of "
            f"{count:,} texts",
            "rows go train first, then heldout; or give a .parquet with `id` and `embedding`",
        )
    width = table.shape[1]
    if isinstance(table, np.memmap) and table.flags.c_contiguous:
        return Embeddings(Column.over(path, table.dtype, width, table.offset))
    rows = Column(folder, table.dtype, width)  # by columns: turned here, a block at a time
    for block in _blocks(count):
        rows.add(table[block])
    return Embeddings(rows)


def _rows(path: Path, ids: Names, folder: Path | None, memory_bytes: int) -> Embeddings:
    """The table as it is, and where in it the texts are, found by the digests of their ids."""
    import pyarrow as pa

    keys = SameKey(folder, memory_bytes)
    rows: Column | None = None
    try:
        for batch in parquet.opened(path).iter_batches(_BLOCK, columns=["id", "embedding"]):
            keys.add([str(name) for name in batch.column("id").to_pylist()])
            values = _values(path, batch.column("embedding"))
            rows = Column(folder, np.float32, values.shape[1]) if rows is None else rows
            if values.shape[1] != rows.width:
                raise UserError(f"the embeddings in {path.name} have different lengths")
            rows.add(values)
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise UserError(f"cannot read `id` and `embedding` of {path}: {error}") from error
    count = 0 if rows is None else len(rows)
    for block in _blocks(len(ids)):
        keys.add(ids.take(np.arange(block.start, block.stop)))
    at = _last_before(keys, count, len(ids), folder)
    missing, first = 0, -1
    for start, part in at.chunks():
        none = np.flatnonzero(part < 0)
        first = start + int(none[0]) if len(none) and first < 0 else first
        missing += len(none)
    if missing:
        name = ids.take(np.array([first]))[0]
        raise UserError(f"{missing:,} texts have no embedding, the first is {name!r}")
    assert rows is not None, "a text, but no rows"
    return Embeddings(rows, at)


def _values(path: Path, column: Any) -> np.ndarray:
    """float32 [rows, E] of a column of lists. UserError unless all are of one length."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(column).unique().to_pylist()  # type: ignore[attr-defined]
    if len(lengths) != 1 or not lengths[0]:
        raise UserError(f"the embeddings in {path.name} have different lengths")
    return np.asarray(column.flatten(), np.float32).reshape(-1, lengths[0])


def _last_before(keys: SameKey, count: int, wanted: int, folder: Path | None) -> Column:
    """int64 [wanted]: of the `count` keys that came first the last one that equals each of the others; -1 if
    none does."""
    out = Column(folder, np.int64)
    for block in _blocks(wanted):
        out.add(np.full(block.stop - block.start, -1))
    for place, same in keys.runs():
        at = np.arange(len(place))
        begin = np.maximum.accumulate(np.where(np.concatenate([[False], same]), 0, at))  # of its run
        last = np.maximum.accumulate(np.where(place < count, at, -1))
        asks = np.flatnonzero((place >= count) & (last >= begin))
        out.put(place[asks] - count, place[last[asks]])
    keys.close()
    return out
