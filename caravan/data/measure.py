"""Signals of a corpus: computed batch by batch, kept as a Parquet table beside it, read back in the same
order."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caravan.data import parquet, quality, signals
from caravan.data.steps import batches
from caravan.types import Document, UserError

CLASSIFIED = ("quality", "toxicity")
"""Signals that need a trained classifier; `bits_per_byte` needs a model."""
PERPLEXITY = "bits_per_byte"
GROUP_ROWS = 1 << 14
"""Of a Parquet file: rows held until they are written."""
PART_ROWS = 1 << 20
"""Of one file. Whoever writes or reads a Parquet file holds what it says of its row groups: for 64 groups of
all signals about 5 MB."""


def document_batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Batches of about a million characters."""
    return batches(documents, lambda d: len(d.text))


@dataclass(frozen=True)
class Measure:
    """batch of documents -> {signal: array [D]}, with `id`. Cheap to send to another process."""

    families: tuple[str, ...]
    classifiers: tuple[tuple[str, str], ...] = ()
    """(signal, folder of its classifier)."""

    def __post_init__(self) -> None:
        signals.compute(signals.View([]), self.families)  # tables made here are shared by forked processes

    def __call__(self, documents: Sequence[Document]) -> dict[str, np.ndarray]:
        view = signals.View([d.text for d in documents], [d.lang for d in documents])
        out: dict[str, np.ndarray] = {"id": np.array([d.id for d in documents], object)}
        out |= signals.compute(view, self.families)
        out |= {name: _classifier(folder).judge(view.texts) for name, folder in self.classifiers}
        return out


@functools.lru_cache(maxsize=4)
def _classifier(folder: str) -> quality.Classifier:
    return quality.Classifier.load(Path(folder))


def parts(path: Path) -> Iterator[Path]:
    """Files of one table: train.parquet, train.1.parquet, train.2.parquet, ..., as many as there are."""
    for number in itertools.count():
        part = _part(path, number)
        if number and not part.is_file():
            return
        yield part


def _part(path: Path, number: int) -> Path:
    return path.with_suffix(f".{number}{path.suffix}") if number else path


class Writer:
    """A Parquet table of signals, in files of so many rows. What a file says of its row groups stays in
    memory until it is closed, so batches are gathered to large ones."""

    def __init__(self, path: Path, group_rows: int = GROUP_ROWS, part_rows: int = PART_ROWS) -> None:
        self._path, self._group_rows, self._part_rows = path, group_rows, part_rows
        self._writer: Any = None
        self._waiting: list[dict[str, np.ndarray]] = []
        self._rows = self._written = self._parts = 0

    def __enter__(self) -> Writer:
        return self

    def write(self, table: dict[str, np.ndarray]) -> None:
        self._waiting.append(table)
        self._rows += len(table["id"])
        if self._rows >= self._group_rows:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = {k: np.concatenate([one[k] for one in self._waiting]) for k in self._waiting[0]}
        self._waiting, self._rows = [], 0
        rows = pa.table(
            {k: pa.array(v, pa.string() if v.dtype == object else None) for k, v in table.items()}
        )
        if self._writer is None:
            self._writer = pq.ParquetWriter(_part(self._path, self._parts), rows.schema, compression="zstd")
        self._writer.write_table(rows)
        self._written += len(rows)
        if self._written >= self._part_rows:
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer, self._written, self._parts = None, 0, self._parts + 1

    def __exit__(self, *_: Any) -> None:
        if self._waiting:
            self._flush()
        self._close()


class Reader:
    """Rows of a table of signals, a few at a time and in order; of its first file, its path."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        first = self._opened(path, columns)
        rest = (self._opened(part, columns) for part in itertools.islice(parts(path), 1, None))
        self._left = itertools.chain(first, itertools.chain.from_iterable(rest))
        self._rows: dict[str, np.ndarray] = {}

    def _opened(self, path: Path, columns: Sequence[str]) -> Iterator[Any]:
        import pyarrow as pa

        try:
            file = parquet.opened(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"cannot read the signals in {path}: {error}") from error
        for name in columns:
            if name not in file.schema_arrow.names:
                raise UserError(f"the signals hold no `{name}`", how(name))
        return iter(file.iter_batches(GROUP_ROWS // 2, columns=["id", *columns]))

    def take(self, count: int) -> dict[str, np.ndarray]:
        """The next `count` rows, or fewer at the end."""
        while not self._rows or len(self._rows["id"]) < count:
            more = next(self._left, None)
            if more is None:
                break
            arrays = {name: more.column(name).to_numpy(zero_copy_only=False) for name in more.schema.names}
            old = self._rows
            self._rows = {k: np.concatenate([old[k], v]) for k, v in arrays.items()} if old else arrays
        out = {k: v[:count] for k, v in self._rows.items()}
        self._rows = {k: v[count:] for k, v in self._rows.items()}
        return out


def how(signal: str) -> str:
    """How to come by a signal."""
    if signal in CLASSIFIED:
        return f"make them with `caravan signals --{signal} CLASSIFIER`, which `caravan quality` trains"
    if signal == PERPLEXITY:
        return "make them with `caravan signals --model MODEL`"
    family = signals.families_of([signal])
    return (
        f"make them with the family `{family[0]}`"
        if family
        else "`caravan signals --help` names what there is"
    )


class Sample:
    """Some documents' signals for a summary: those with the smallest hashes of their ids, whatever their
    order."""

    def __init__(self, most: int = 20_000) -> None:
        self._most = most
        self._draw = np.zeros(0)
        self._rows: dict[str, np.ndarray] = {}

    def add(self, table: dict[str, np.ndarray]) -> None:
        draw = np.concatenate([self._draw, quality.uniform(table["id"].tolist(), 1)])
        numbers = {k: v for k, v in table.items() if v.dtype.kind in "if"}
        old = self._rows
        rows = {k: np.concatenate([old[k], v]) for k, v in numbers.items()} if old else numbers
        keep = np.argsort(draw, kind="stable")[: self._most]
        self._draw, self._rows = draw[keep], {k: v[keep] for k, v in rows.items()}

    def quantiles(self) -> dict[str, dict[str, float]]:
        """Signal -> its 1st, 5th, 50th, 95th and 99th percentile."""
        out = {}
        for name, values in self._rows.items():
            known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
            if len(known):
                points = np.quantile(known, (0.01, 0.05, 0.5, 0.95, 0.99), method="inverted_cdf")
                out[name] = {
                    f"p{p}": round(float(v), 5) for p, v in zip((1, 5, 50, 95, 99), points, strict=True)
                }
        return out
