"""Items of any benchmark file, as the texts that must not be in training text.

.jsonl, .json (an array, or an object of arrays), .csv, .tsv, .parquet, .txt (one item per line), each also as
.gz or .zst. Of an item, every string of 13 words or more is wanted, and the longest of the shorter ones;
options such as "all of the above" say nothing by themselves."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import zstandard

from caravan.data.decontaminate import NGRAM, words
from caravan.types import UserError

_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_CELL = 1 << 24


@dataclass(frozen=True, slots=True)
class Item:
    """One item: its benchmark (the file's name), its number or id there, and the texts to look for."""

    benchmark: str
    id: str
    texts: tuple[str, ...]


def read(folder: Path) -> Iterator[Item]:
    """Items of a file or of all benchmark files in a folder, by name. Raises UserError naming the file that
    cannot be read, or if there is none."""
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    ours = (folder / "manifest.json", folder / "timing.jsonl")  # an artefact's own
    files = [p for p in files if _kind(p) in _KINDS and p not in ours and not p.name.startswith(".")]
    if not files:
        raise UserError(
            f"no benchmark file in {folder}", f"expected {', '.join(_KINDS)}, also as .gz or .zst"
        )
    for path in files:
        name = path.relative_to(folder).as_posix() if path != folder else path.name
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
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(path).iter_batches(1024):
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
