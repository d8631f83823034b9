"""How the documents of a shard become rows of at most T tokens, and which row is read when.

    chunk     the shard cut every T tokens, whatever lies there: every row is full, documents are cut
    best_fit  documents whole, as many to a row as fit best; longer ones cut every T tokens (Ding et al. 2024,
              arXiv 2404.10830). Rows are almost full
    document  one document to a row

Segments never see each other, however they came to share a row. The k-th row read of a shard is

    feistel(k mod rows, rows, hash(seed, k div rows)),

so no state is kept but k. `best_fit` and `document` keep 24 bytes per piece of a document in memory, and 8
per row; `chunk` nothing.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from caravan.data.pack import best_fit
from caravan.data.permute import feistel, mix
from caravan.data.shards import Shards

Packing = Literal["chunk", "best_fit", "document"]


class Rows:
    """The rows of one shard. `rows` of them in an epoch, `tokens` in all."""

    def __init__(self, shards: Shards, sequence_length: int, packing: Packing, seed: int) -> None:
        self.shards, self.packing = shards, packing
        self._length, self._seed = sequence_length, seed
        if packing == "chunk":
            self.rows = len(shards) // sequence_length
            """A rest shorter than a row is left out."""
            self.tokens = self.rows * sequence_length
            return
        starts, sizes = pieces_of(shards.ends, sequence_length)
        bins = best_fit(sizes, sequence_length) if packing == "best_fit" else np.arange(len(sizes))
        order = np.argsort(bins, kind="stable")
        self._starts, self._sizes = starts[order], sizes[order]
        self.rows = int(bins.max()) + 1
        self._first = np.searchsorted(bins[order], np.arange(self.rows + 1))
        """Of each row: its first piece."""
        self.tokens = int(sizes.sum())
        self._epoch, self._read = -1, starts[:0]
        """Tokens before each row in the order of one epoch: the last one asked for."""

    def order(self, number: np.ndarray) -> np.ndarray:
        """Row that is read as the k-th, int64, for each k."""
        epochs = number // self.rows
        out = np.empty_like(number)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = feistel(number[here] % self.rows, self.rows, mix(self._seed, int(epoch)))
        return out

    def pieces(self, row: int) -> list[tuple[Shards, int, int]]:
        """(shards, start, stop) of what lies in a row."""
        if self.packing == "chunk":
            return [(self.shards, row * self._length, (row + 1) * self._length)]
        inside = slice(int(self._first[row]), int(self._first[row + 1]))
        starts, sizes = self._starts[inside].tolist(), self._sizes[inside].tolist()
        return [(self.shards, start, start + size) for start, size in zip(starts, sizes, strict=True)]

    def targets(self, row: int) -> int:
        """Tokens of a row less those that end a document."""
        pieces = [edge for _, start, stop in self.pieces(row) for edge in (start, stop)]
        ended = np.searchsorted(self.shards.ends, pieces, side="right").reshape(-1, 2)
        edges = np.asarray(pieces).reshape(-1, 2)
        return int((edges[:, 1] - edges[:, 0]).sum() - (ended[:, 1] - ended[:, 0]).sum())

    def tokens_before(self, number: int) -> int:
        """Tokens of the rows read before the k-th."""
        epochs, rest = divmod(number, self.rows)
        if self.packing == "chunk":
            return number * self._length
        if self._epoch != epochs:
            ends = np.concatenate([[0], np.cumsum(self._sizes)])
            sizes = np.diff(ends[self._first])[self.order(epochs * self.rows + np.arange(self.rows))]
            self._read, self._epoch = np.concatenate([[0], np.cumsum(sizes)]), epochs
        return epochs * self.tokens + int(self._read[rest])


def pieces_of(ends: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, length) int64 of every document, cut every `most` tokens."""
    stops = np.asarray(ends, dtype=np.int64)
    begins = np.concatenate([np.zeros(1, np.int64), stops[:-1]])
    count = -(-(stops - begins) // most)
    which = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    starts = np.repeat(begins, count) + which * most
    return starts, np.minimum(np.repeat(stops, count) - starts, most)
