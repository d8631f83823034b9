"""Columns on disk answer as arrays do, however little may be held."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from caravan.data import records
from caravan.data.columns import Column, Names
from caravan.data.dedup import Links, Ranks, SameKey


@pytest.mark.parametrize("held", [1 << 10, 200 << 10, 1 << 30])
def test_a_column_is_an_array(tmp_path: Path, held: int) -> None:
    draw = np.random.default_rng(0)
    column, array = Column(tmp_path, np.int64, held_bytes=held), np.zeros(0, np.int64)
    for _ in range(3):  # rows may be added after others were looked at
        more = draw.integers(0, 1 << 40, 50_000)
        column.add(more)
        array = np.concatenate([array, more])
        places = draw.integers(0, len(array), 2_000)
        assert (column.take(places) == array[places]).all()
        values = draw.integers(0, 1 << 40, 2_000)
        column.least(places, values)
        np.minimum.at(array, places, values)
        column.count(places)
        np.add.at(array, places, 1)
        column.put(places[:1], 7)
        array[places[0]] = 7
    assert len(column) == len(array) and (column[10:100_000] == array[10:100_000]).all()
    assert all((part == array[at : at + len(part)]).all() for at, part in column.chunks(7_000))
    ascending = Column(tmp_path, np.int64, held_bytes=held)
    ascending.add(np.sort(array))
    wanted = np.searchsorted(np.sort(array), array[:300], side="right")
    assert (ascending.search(array[:300]) == wanted).all()
    assert not list(tmp_path.iterdir()), "files without a name"


def test_rows_of_several_numbers(tmp_path: Path) -> None:
    column = Column(tmp_path, np.uint32, 5, held_bytes=1 << 10)
    rows = np.arange(100_000, dtype=np.uint32).reshape(-1, 5)
    column.add(rows[:7])
    column.add(rows[7:])
    assert (column.take(np.array([19_999, 0, 7])) == rows[[19_999, 0, 7]]).all()
    assert Column(tmp_path, np.uint8)[:].tolist() == [] == list(Column(tmp_path, np.uint8).chunks())


def test_pages_are_given_back(tmp_path: Path) -> None:
    """Of 40 MB that were looked at, little is left in this process."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE  # of files

    column = Column.numbered(tmp_path, 5_000_000)
    before = resident()
    places = np.random.default_rng(1).integers(0, len(column), 20_000)
    assert (column.take(places) == places).all()
    column.put(places, places)
    assert resident() - before < 12 << 20
    assert (column.take(places) == places).all(), "what was written is there"


def test_names(tmp_path: Path) -> None:
    names, given = Names(tmp_path), [f"text {k} é{'x' * (k % 5)}" for k in range(300)] + ["", "\ud800"]
    names.add(given[:100])
    assert names.take(np.array([99, 0, 5])) == [given[99], given[0], given[5]]
    names.add(given[100:])
    assert names.take(np.arange(len(given))) == given and len(names) == len(given)


def test_clusters_are_the_same_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from caravan.data.dedup import keepers

    draw = np.random.default_rng(2)
    a, b = draw.integers(0, 3_000, (2, 2_000))
    ranks = Ranks(tmp_path)
    ranks.add(draw.integers(0, 9, 3_000), draw.integers(0, 3, 3_000), draw.integers(0, 2, 3_000) > 0)
    found = []
    for chunk in (1 << 16, 100, 1):
        monkeypatch.setattr(keepers, "_CHUNK", chunk)
        links = Links(3_000, tmp_path)
        links.add(a, b)
        found.append([x.tolist() for x in links.clusters(ranks)])
    assert found[0] == found[1] == found[2] and len(found[0][0]) > 1_000
    copies, stays = map(np.array, found[0])
    assert not ranks.better(copies, stays).any()


def test_what_came_before_by_128_bits(tmp_path: Path) -> None:
    keys = [(1, 1), (2, 1), (1, 1), (1, 2), (2, 1), (1, 1)]
    for memory in (1, 1 << 20):
        same = SameKey(tmp_path, memory)
        same.add_digests(keys[:2])
        same.add_digests(keys[2:])
        assert same.repeated()[:].tolist() == [0, 0, 1, 0, 1, 1]


def test_a_spool_longer_than_a_chunk(tmp_path: Path) -> None:
    spool = records.Spool(tmp_path / "lines")
    count = 40_000  # more than two chunks
    for k in range(count):
        spool.add(b"%d\n" % k, str(k), ("", "train", "heldout")[k % 3])
    rows = list(spool.split(0.25))
    assert [int(line) for _, line in rows] == list(range(count))
    for k, (split, _) in enumerate(rows):
        free = "heldout" if records.share_of(str(k)) < 0.25 else "train"
        assert split == (free, "train", "heldout")[k % 3]
    assert not list(tmp_path.iterdir())


def test_what_goes_does_not_decide_the_split(tmp_path: Path) -> None:
    """The only text that asks to be held out is a copy: another one is held out in its place."""
    spool, gone = records.Spool(tmp_path / "lines"), Column(tmp_path, np.uint8)
    for key, forced in (("a", ""), ("b", ""), ("a", "heldout")):
        spool.add(b"x\n", key, forced)
    gone.add([0, 0, 1])
    assert [split for split, _ in spool.split(1e-9, gone)][:2].count("heldout") == 1
