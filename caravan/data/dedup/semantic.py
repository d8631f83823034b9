"""Texts that say the same: SemDeDup (Abbas et al. 2023, arXiv 2303.09540) on given embeddings.

Embeddings are normalised and grouped by spherical k-means, so that only texts of one group are compared; a
text goes if a better ranked one of its group (see `keepers`) has a cosine of at least the threshold. Two
texts alike but in different groups are missed: fewer groups find more and cost more. Their paper keeps the
text farthest from the centre; here it is the common rule.

Everything is done in the order of the texts' hashes and in blocks of fixed size, so that shards and their
order change nothing.

Legend: D texts, E width of an embedding, C groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from caravan.data.dedup.keepers import Ranks
from caravan.types import UserError

_BLOCK = 1024


def similar(
    embedding_DE: np.ndarray, ranks: Ranks, cosine: float, groups: int = 0, rounds: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(texts that go int64 ascending, the text each resembles most int64, their cosine float32).

    `groups` 0 takes the square root of the number of texts over 4, at least one. `embedding_DE` may be a
    memory map; what is held is a block of rows, the centres and one group."""
    if len(embedding_DE) != len(ranks):
        raise UserError(
            f"{len(embedding_DE):,} embeddings for {len(ranks):,} texts", "one row per text, in its order"
        )
    none = np.zeros(0, np.int64)
    if len(ranks) < 2:
        return none, none, np.zeros(0, np.float32)
    order = np.lexsort((ranks.columns()[1], ranks.columns()[0]))
    groups = min(groups or max(1, int(np.sqrt(len(order)) / 4)), len(order))
    member = _groups(embedding_DE, order, groups, rounds)
    position = ranks.position()
    rows = [_within(embedding_DE, order[member == c], position, cosine) for c in range(groups)]
    gone, like, near = (np.concatenate([r[k] for r in rows]) for k in range(3))
    ascending = np.argsort(gone)
    return gone[ascending], like[ascending], near[ascending]


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    if not np.isfinite(rows).all():
        raise UserError("an embedding holds a number that is not finite")
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _groups(embedding_DE: np.ndarray, order: np.ndarray, groups: int, rounds: int) -> np.ndarray:
    """int64 [D]: group of each text, in `order`. Centres are found on at most 256 texts per group."""
    sample = _unit(embedding_DE[order[: 256 * groups]])  # hashes are random, so the first are a fair draw
    centres = sample[:groups].copy()
    for _ in range(rounds if groups > 1 else 0):
        nearest = _nearest(sample, centres)
        total = np.zeros_like(centres, np.float64)
        np.add.at(total, nearest, sample)
        filled = np.bincount(nearest, minlength=groups) > 0
        centres[filled] = _unit(total[filled])  # an empty group keeps its centre
    out = np.zeros(len(order), np.int64)
    for at in range(0, len(order), _BLOCK):
        out[at : at + _BLOCK] = _nearest(_unit(embedding_DE[order[at : at + _BLOCK]]), centres)
    return out


def _nearest(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    blocks = (rows[at : at + _BLOCK] @ centres.T for at in range(0, len(rows), _BLOCK))
    return np.concatenate([b.argmax(axis=1) for b in blocks])


def _within(
    embedding_DE: np.ndarray, places: np.ndarray, position: np.ndarray, cosine: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `similar`, for the texts of one group."""
    places = places[np.argsort(position[places])]  # best ranked first: only what came before is looked at
    rows = _unit(embedding_DE[places]) if len(places) else np.zeros((0, 1), np.float32)
    gone, like, near = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for at in range(0, len(places), _BLOCK):
        block = rows[at : at + _BLOCK]
        close = block @ rows[: at + len(block)].T
        own = np.arange(len(block))[:, None] + at
        close[np.arange(close.shape[1])[None, :] >= own] = -2.0
        best = close.argmax(axis=1)
        value = close[np.arange(len(block)), best]
        found = np.flatnonzero(value >= cosine - 1e-6)
        gone.append(places[at + found])
        like.append(places[best[found]])
        near.append(value[found])
    return np.concatenate(gone), np.concatenate(like), np.concatenate(near)


def read(path: Path, ids: Sequence[str]) -> np.ndarray:
    """float [D, E] of a .npy file (one row per text, in order) or a .parquet file with columns `id` and
    `embedding` (in any order). Raises UserError if a text has none."""
    if path.is_dir():
        files = sorted([*path.glob("*.npy"), *path.glob("*.parquet")])
        if len(files) != 1:
            raise UserError(f"expected one .npy or .parquet file in {path}, found {len(files)}")
        path = files[0]
    if path.suffix == ".npy":
        try:
            table = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
        if table.ndim != 2 or len(table) != len(ids) or table.dtype.kind != "f":
            raise UserError(
                f"{path.name} holds {table.dtype} {table.shape}, not one row of floats for each of "
                f"{len(ids):,} texts",
                "rows go train first, then heldout; or give a .parquet with `id` and `embedding`",
            )
        return table
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path, columns=["id", "embedding"])
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise UserError(f"cannot read `id` and `embedding` of {path}: {error}") from error
    at = {k: n for n, k in enumerate(rows.column("id").to_pylist())}
    missing = [k for k in ids if k not in at]
    if missing:
        raise UserError(f"{len(missing):,} texts have no embedding, the first is {missing[0]!r}")
    flat = rows.column("embedding").combine_chunks()
    values = np.asarray(flat.flatten(), np.float32)
    if len(values) % max(1, len(rows)):
        raise UserError(f"the embeddings in {path.name} have different lengths")
    return values.reshape(len(rows), -1)[[at[k] for k in ids]]
