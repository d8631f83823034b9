"""Items of any benchmark file, as the texts that must not be in training text.

.jsonl, .json (an array, or an object of arrays), .csv, .tsv, .parquet, .txt (one item per line), each also as
.gz or .zst. Of an item, every string of 13 words or more is wanted, and the longest of the shorter ones;
options such as "all of the above" say nothing by themselves. `without` writes a file again with some of its
items left out."""

from __future__ import annotations

import csv
import functools
import gzip
import io
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import zstandard

from caravan.data import parquet
from caravan.data.decontaminate import NGRAM, Hit, Index, words
from caravan.types import Document, UserError

_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_UNREAD = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz", ".arrow", ".feather", ".ndjson", ".pkl")
"""Ends of names that promise data: such a file, left out in silence, would pass for looked for."""
_CELL = 1 << 24
REMOVED = "removed.jsonl.zst"
"""What a stage left out of benchmarks: no benchmark itself."""


@dataclass(frozen=True, slots=True)
class Item:
    """One item: its benchmark (the file's name), its number or id there, and the texts to look for."""

    benchmark: str
    id: str
    texts: tuple[str, ...]


def read(folder: Path) -> Iterator[Item]:
    """Items of a file or of all benchmark files in a folder, by name. Raises UserError naming the file that
    cannot be read, or if there is none."""
    for name, path in files(folder):
        yield from items(name, path)


def files(folder: Path) -> list[tuple[str, Path]]:
    """(name, path) of a file or of all benchmark files in a folder. UserError if there is none."""
    found = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    ours = [folder / name for name in ("manifest.json", "timing.jsonl", REMOVED)]  # an artefact's own
    for path in found:
        if _kind(path) not in _KINDS and path.suffix.lower() in _UNREAD:
            raise UserError(
                f"{path.name} is a benchmark that cannot be read",
                f"expected {', '.join(_KINDS)}, also as .gz or .zst: convert it or take it away",
            )
    found = [p for p in found if _kind(p) in _KINDS and p not in ours and not p.name.startswith(".")]
    if not found:
        raise UserError(
            f"no benchmark file in {folder}", f"expected {', '.join(_KINDS)}, also as .gz or .zst"
        )
    return [(p.relative_to(folder).as_posix() if p != folder else p.name, p) for p in found]


def items(name: str, path: Path) -> Iterator[Item]:
    """Items of one file. UserError naming it if it cannot be read."""
    try:
        for number, row in enumerate(_rows(path)):
            yield Item(name, _id(row, number), tuple(wanted(row)))
    except (OSError, ValueError, csv.Error, zstandard.ZstdError, EOFError) as error:
        raise UserError(f"cannot read the benchmark {name}: {error}") from error


def wanted(row: Any) -> Iterator[str]:
    """Strings of an item to look for."""
    leaves = [leaf for leaf in _leaves(row) if leaf.strip()]
    sizes = [len(words(leaf)) for leaf in leaves]
    yield from (leaf for leaf, size in zip(leaves, sizes, strict=True) if size >= NGRAM)
    short = [(size, leaf) for leaf, size in zip(leaves, sizes, strict=True) if size < NGRAM]
    if short and max(sizes) < NGRAM:
        yield max(short, key=lambda pair: pair[0])[1]


def _leaves(row: Any) -> Iterator[str]:
    if isinstance(row, str):
        yield row
    elif isinstance(row, dict):
        for value in row.values():
            yield from _leaves(value)
    elif isinstance(row, list | tuple):
        for value in row:
            yield from _leaves(value)


def _id(row: Any, number: int) -> str:
    if isinstance(row, dict):
        for key in ("id", "task_id", "question_id", "qid", "idx"):
            if isinstance(row.get(key), str | int):
                return str(row[key])
    return str(number)


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


def _rows(path: Path) -> Iterator[Any]:
    kind = _kind(path)
    if kind == ".parquet":
        for batch in parquet.opened(path).iter_batches(1024):
            yield from batch.to_pylist()
        return
    with _opened(path) as file:
        if kind == ".jsonl":
            yield from (orjson.loads(line) for line in file if line.strip())
        elif kind == ".json":
            yield from _items(orjson.loads(file.read()))
        elif kind == ".txt":
            yield from (line.decode("utf-8", "replace").strip() for line in file if line.strip())
        else:
            text = io.TextIOWrapper(file, "utf-8-sig", "replace", newline="")
            csv.field_size_limit(_CELL)
            yield from csv.reader(text, delimiter="\t" if kind == ".tsv" else ",")


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        yield from value
        return
    lists = [v for v in value.values() if isinstance(v, list)] if isinstance(value, dict) else []
    if not lists:
        yield value
    for one in lists:
        yield from one


def _opened(path: Path) -> Any:
    raw = open(path, "rb")  # noqa: SIM115  (closed by the wrapper)
    if path.suffix == ".gz":
        return gzip.open(raw)
    if path.suffix == ".zst":
        stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(stream, 1 << 20)  # type: ignore[arg-type]
    return raw


def without(path: Path, target: Path, gone: Collection[int]) -> None:
    """Write a benchmark file again without the items of these numbers, in its format and packing. Lines of
    .jsonl and .txt stay as they are; .json, .csv and .parquet are written anew."""
    kind = _kind(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if kind == ".parquet":
        _without_rows(path, target, gone)
        return
    with _opened(path) as file, _written(target) as out:
        if kind in (".jsonl", ".txt"):
            number = 0
            for line in file:
                if line.strip():
                    number += 1
                    if number - 1 in gone:
                        continue
                out.write(line)
        elif kind == ".json":
            kept = _without_items(orjson.loads(file.read()), gone)
            out.write(orjson.dumps(kept, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        else:
            delimiter = "\t" if kind == ".tsv" else ","
            text = io.TextIOWrapper(file, "utf-8-sig", "replace", newline="")
            table = io.TextIOWrapper(out, "utf-8", newline="")
            csv.field_size_limit(_CELL)
            rows = csv.writer(table, delimiter=delimiter, lineterminator="\n")
            for number, row in enumerate(csv.reader(text, delimiter=delimiter)):
                if number not in gone:
                    rows.writerow(row)
            table.flush()
            table.detach()


def _without_items(value: Any, gone: Collection[int]) -> Any:
    """The value of a .json file with items left out; they are numbered as `_items` gives them."""
    if isinstance(value, list):
        return [one for number, one in enumerate(value) if number not in gone]
    if not isinstance(value, dict) or not any(isinstance(v, list) for v in value.values()):
        return [] if 0 in gone else value
    out, first = {}, 0
    for key, inner in value.items():
        out[key] = inner
        if isinstance(inner, list):
            out[key] = [one for number, one in enumerate(inner, first) if number not in gone]
            first += len(inner)
    return out


def _without_rows(path: Path, target: Path, gone: Collection[int]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    source, first = parquet.opened(path), 0
    with pq.ParquetWriter(target, source.schema_arrow) as out:
        for batch in source.iter_batches(1024):
            stays = pa.array([number not in gone for number in range(first, first + len(batch))])
            out.write_batch(batch.filter(stays))
            first += len(batch)


@contextmanager
def _written(path: Path) -> Iterator[Any]:
    with open(path, "wb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
                yield packed
        elif path.suffix == ".zst":
            with zstandard.ZstdCompressor(level=3).stream_writer(raw) as packed:
                yield packed
        else:
            yield raw


class Wanted:
    """Items of all benchmarks, and the index of their texts."""

    def __init__(self, folders: Sequence[str], fewest: int) -> None:
        self.index = Index(fewest=fewest)
        self.items: list[Item] = []
        self.checked: list[bool] = []
        """Of each item, whether a text of it is long enough to be looked for."""
        self.owner_of: list[int] = []
        """Of each text, whose it is."""
        self.texts_of: list[range] = []
        self.files: list[tuple[int, str, Path, range]] = []
        """(number of the folder, name, path, its items) of each file."""
        for k, folder in enumerate(folders):
            for name, path in files(Path(folder)):
                first = len(self.items)
                self.items += items(name, path)
                self.files.append((k, name, path, range(first, len(self.items))))
        long_enough = self.index.extend([text for item in self.items for text in item.texts])
        for number, item in enumerate(self.items):
            own = range(len(self.owner_of), len(self.owner_of) + len(item.texts))
            self.owner_of += [number] * len(own)
            self.texts_of.append(own)
            self.checked.append(any(long_enough[own.start : own.stop]))
        self.index.prepare()

    def items_of(self, gram: int) -> set[int]:
        """Items that have an n-gram."""
        return {self.owner_of[text] for text in self.index.owners(gram)}

    def covered(self, item: int, found: Collection[int]) -> float:
        """Share of the words of an item's most covered text that stand in n-grams that were found."""
        return max((self.index.covered(text, found) for text in self.texts_of[item]), default=0.0)


@functools.lru_cache(maxsize=1)
def wanted_in(folders: tuple[str, ...], fewest: int) -> Wanted:
    """Forked processes find this made; others make it once."""
    return Wanted(folders, fewest)


@dataclass(frozen=True)
class Search:
    """batch of (anything, document) -> hits in each. Cheap to send to another process, unlike the index."""

    folders: tuple[str, ...]
    fewest: int

    def __call__(self, batch: Sequence[tuple[Any, Document]]) -> list[list[Hit]]:
        index = wanted_in(self.folders, self.fewest).index
        return index.search([document.text for _, document in batch])
