"""Which tokens belong to step s: pure functions of (seed, step), so resuming is knowing the step number.

Every loader answers `micro_batches(step, micro_tokens)`: all micro batches of one optimiser step, the same
list on every machine; rank r of W takes r, r+W, r+2W, … `normaliser(step)` is the weight of the whole step,
what the sum of losses is divided by, so that neither the number of ranks nor of micro batches changes a
gradient.

Legend: N flat tokens of a batch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from caravan.data.pack import GroupBatch, first_fit, group_batch, lm_batch, positions
from caravan.data.permute import feistel, mix
from caravan.data.render import Rendered
from caravan.data.shards import Shards
from caravan.types import Batch, UserError


class PretrainLoader:
    """Rows of `sequence_length` tokens of the shards in random order, epoch after epoch.

    A row is cut into segments at document ends; each token predicts the next of its document, also over the
    end of the row. `batch_tokens` is a number, or a function of the step (a ramp): then offsets are running
    sums, computed once up to the step asked for.
    """

    def __init__(
        self, shards: Shards, batch_tokens: int | Callable[[int], int], sequence_length: int, seed: int = 0
    ) -> None:
        if len(shards) < 2:
            raise UserError("the shards hold no text to train on", "look at the facts of the corpus stage")
        self.shards, self.seed = shards, seed
        self.sequence_length = min(sequence_length, len(shards))
        self.rows = len(shards) // self.sequence_length
        """Rows of one epoch; a rest shorter than a row is left out."""
        self._batch_tokens = batch_tokens
        self._offsets = [0]

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps that see every row about once (at least 1)."""
        if not callable(self._batch_tokens):
            return max(1, round(self.rows / self._rows_at(0)))
        self._extend(lambda: self._offsets[-1] >= self.rows)
        return max(1, bisect_right(self._offsets, self.rows) - 1)

    def _rows_at(self, step: int) -> int:
        tokens = self._batch_tokens(step) if callable(self._batch_tokens) else self._batch_tokens
        return max(1, tokens // self.sequence_length)

    def _extend(self, enough: Callable[[], bool]) -> None:
        while not enough():
            self._offsets.append(self._offsets[-1] + self._rows_at(len(self._offsets) - 1))

    def _span(self, step: int) -> tuple[int, int]:
        if not callable(self._batch_tokens):
            return step * self._rows_at(0), (step + 1) * self._rows_at(0)
        self._extend(lambda: len(self._offsets) > step + 1)
        return self._offsets[step], self._offsets[step + 1]

    def _starts(self, step: int) -> np.ndarray:
        position = np.arange(*self._span(step), dtype=np.int64)
        epochs = position // self.rows
        rows = np.empty_like(position)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = feistel(position[here] % self.rows, self.rows, mix(self.seed, int(epoch)))
        return rows * self.sequence_length

    def micro_batches(self, step: int, micro_tokens: int) -> list[Batch]:
        """All micro batches of a step, `micro_tokens` tokens each at most (one row at least)."""
        starts = self._starts(step)
        each = max(1, micro_tokens // self.sequence_length)
        return [
            _rows_batch(self.shards, [(int(s), int(s) + self.sequence_length) for s in starts[i : i + each]])
            for i in range(0, len(starts), each)
        ]

    def normaliser(self, step: int) -> float:
        """Targets of the step: its tokens less those that end a document."""
        starts = self._starts(step)
        ended = np.searchsorted(
            self.shards.ends, starts + self.sequence_length, side="right"
        ) - np.searchsorted(self.shards.ends, starts, side="right")
        return float(max(1, len(starts) * self.sequence_length - int(ended.sum())))


class _Epochs:
    """Examples of given sizes to steps: each once per epoch, in a new random order, about `batch_tokens` a
    step.

    Laid end to end in the epoch's order, an example belongs to the step in whose share of the tokens it
    starts. A share is never shorter than the longest example, so no step is empty.
    """

    def __init__(self, sizes: Sequence[int], batch_tokens: int, seed: int) -> None:
        if not len(sizes):
            raise UserError(
                "no examples to train on", "look at the facts and at quarantine.jsonl of the data"
            )
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.seed = seed
        total, longest = int(self.sizes.sum()), int(self.sizes.max())
        self.steps = max(1, min(round(total / max(1, batch_tokens)), total // longest))
        self._epoch = -1
        self._order = self._first = self.sizes

    def of(self, step: int) -> list[int]:
        """Indices of the examples of a step, ascending."""
        epoch, place = divmod(step, self.steps)
        if epoch != self._epoch:
            count = len(self.sizes)
            self._order = feistel(np.arange(count), count, mix(self.seed, epoch))
            ends = np.cumsum(self.sizes[self._order])
            shares = (ends - self.sizes[self._order]) * self.steps // int(ends[-1])
            self._first = np.searchsorted(shares, np.arange(self.steps + 1))
            self._epoch = epoch
        return sorted(int(i) for i in self._order[self._first[place] : self._first[place + 1]])


class ExampleLoader:
    """Rendered conversations, packed to a token budget, documents apart. Every example must be supervised."""

    def __init__(self, examples: Sequence[Rendered], batch_tokens: int, seed: int = 0) -> None:
        self.examples = list(examples)
        assert all(any(e.mask[1:]) for e in self.examples), (
            "an example without supervised tokens: use pack.fit"
        )
        self._epochs = _Epochs([len(e) for e in self.examples], batch_tokens, seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in which every example is seen once."""
        return self._epochs.steps

    def micro_batches(self, step: int, micro_tokens: int) -> list[Batch]:
        """All micro batches of a step; each holds `micro_tokens` tokens at most, or one longer example."""
        return list(example_batches([self.examples[i] for i in self._epochs.of(step)], micro_tokens))

    def normaliser(self, step: int) -> float:
        """Supervised tokens of the step."""
        return float(sum(sum(self.examples[i].mask[1:]) for i in self._epochs.of(step)))


class RankingLoader:
    """Groups of rendered candidates (a pair is a group of two); a group is never split over micro batches."""

    def __init__(self, groups: Sequence[Sequence[Rendered]], batch_tokens: int, seed: int = 0) -> None:
        self.groups = [list(g) for g in groups]
        self._sizes = [sum(len(r) for r in g) for g in self.groups]
        self._epochs = _Epochs(self._sizes, batch_tokens, seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in which every group is seen once."""
        return self._epochs.steps

    def micro_batches(self, step: int, micro_tokens: int) -> list[GroupBatch]:
        """All micro batches of a step; `index` says which groups each holds."""
        chosen = self._epochs.of(step)
        return [
            group_batch([self.groups[chosen[i]] for i in b], [chosen[i] for i in b])
            for b in first_fit([self._sizes[i] for i in chosen], micro_tokens)
        ]

    def normaliser(self, step: int) -> float:
        """Groups of the step."""
        return float(len(self._epochs.of(step)))


def example_batches(examples: Sequence[Rendered], micro_tokens: int) -> Iterator[Batch]:
    """Every example once, packed: held-out evaluation, or one step."""
    for chosen in first_fit([len(e) for e in examples], micro_tokens):
        yield lm_batch([examples[i] for i in chosen])


def group_batches(groups: Sequence[Sequence[Rendered]], micro_tokens: int) -> Iterator[GroupBatch]:
    """Every group once, packed."""
    for chosen in first_fit([sum(len(r) for r in g) for g in groups], micro_tokens):
        yield group_batch([groups[i] for i in chosen], chosen)


def shard_batches(
    shards: Shards, micro_tokens: int, sequence_length: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """Held-out text in order, every token once (or the first `max_tokens`), a shorter last row included."""
    stop = len(shards) if max_tokens is None else min(max_tokens, len(shards))
    rows = [(at, min(at + sequence_length, stop)) for at in range(0, stop, sequence_length)]
    each = max(1, micro_tokens // sequence_length)
    for i in range(0, len(rows), each):
        yield _rows_batch(shards, rows[i : i + each])


def _rows_batch(shards: Shards, spans: Sequence[tuple[int, int]]) -> Batch:
    ids, targets, weights = [], [], []
    lengths: list[int] = []
    for start, stop in spans:
        row = np.asarray(shards.tokens[start : stop + 1]).astype(np.int64)
        inner = shards.segments(start, stop)
        target = np.zeros(stop - start, np.int64)
        target[: len(row) - 1] = row[1 : stop - start + 1]
        weight = np.zeros(stop - start, np.float32)
        weight[: len(row) - 1] = 1.0
        document_ends = (
            shards.ends[slice(*np.searchsorted(shards.ends, [start, stop], side="right"))] - start - 1
        )
        target[document_ends], weight[document_ends] = 0, 0.0
        ids.append(row[: stop - start])
        targets.append(target)
        weights.append(weight)
        lengths += inner
    return Batch(
        torch.from_numpy(np.concatenate(ids)),
        torch.from_numpy(positions(lengths)),
        tuple(lengths),
        torch.from_numpy(np.concatenate(targets)),
        torch.from_numpy(np.concatenate(weights)),
    )
