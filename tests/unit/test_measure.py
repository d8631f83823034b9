"""A table of signals in several files is one table: to its reader, and to the page that draws it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from caravan.data import measure, parquet
from caravan.report import thresholds
from caravan.store import Artefact
from caravan.types import UserError


def tables(count: int) -> list[dict[str, np.ndarray]]:
    """Batches of seven rows."""
    out = []
    for at in range(0, count, 7):
        ids = [f"d{k}" for k in range(at, min(at + 7, count))]
        values = np.arange(at, at + len(ids), dtype=np.float32)
        lang = np.array(["en"] * len(ids), object)
        out.append({"id": np.array(ids, object), "x": values, "lang": lang})
    return out


def write(folder: Path, part_rows: int) -> Path:
    folder.mkdir()
    with measure.Writer(folder / "train.parquet", 5, part_rows) as writer:
        for table in tables(100):
            writer.write(table)
    return folder / "train.parquet"


def test_parts_are_read_as_one(tmp_path: Path) -> None:
    whole, cut = write(tmp_path / "a", 1 << 20), write(tmp_path / "b", 21)
    assert [p.name for p in measure.parts(whole)] == ["train.parquet"]
    names = ["train.parquet", *(f"train.{k}.parquet" for k in range(1, 5))]
    assert [p.name for p in measure.parts(cut)] == names
    assert sorted(names) == sorted(p.name for p in cut.parent.iterdir())
    assert [pq.read_metadata(p).num_rows for p in measure.parts(cut)] == [21, 21, 21, 21, 16]
    assert pq.read_metadata(cut).num_row_groups == 3, "a footer of a few groups"
    readers = [measure.Reader(path, ["x"]) for path in (whole, cut)]
    for count in (1, 30, 2, 60, 9):
        one, other = (reader.take(count) for reader in readers)
        assert one["id"].tolist() == other["id"].tolist() and np.array_equal(one["x"], other["x"])
    with pytest.raises(UserError, match="hold no `y`"):
        measure.Reader(cut, ["y"])


def test_a_histogram_counts_every_part(tmp_path: Path) -> None:
    found = []
    facts = {"quantiles": {"x": {"p1": 1.0, "p99": 99.0}}}
    rules = {"much": {"signal": "x", "limit": "at most 60"}}
    for name, part_rows in (("a", 1 << 20), ("b", 21)):
        write(tmp_path / name, part_rows)
        art = Artefact(tmp_path / name, {"kind": "signals", "facts": facts})
        found.append(thresholds.histograms(art, rules))
    assert sum(found[0]["much"].counts) == 100 and found[0] == found[1]


def test_a_parquet_file_is_not_held_while_it_is_read(tmp_path: Path) -> None:
    """40 row groups of 256 KB that nothing shortens."""
    draw = np.random.default_rng(1)
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema({"x": pa.float64()})) as file:
        for _ in range(40):
            file.write_table(pa.table({"x": draw.normal(size=1 << 15)}))
    held = [pa.total_allocated_bytes()]
    for _batch in parquet.opened(tmp_path / "a.parquet").iter_batches(1024):
        held.append(pa.total_allocated_bytes())
    assert len(held) == 1 + 40 * 32 and max(held) - held[0] < 4 << 20
