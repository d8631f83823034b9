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
from itertools import accumulate

import numpy as np
import torch

from caravan.data.mix import Phase, Timetable, apportion
from caravan.data.pack import GroupBatch, first_fit, group_batch, lm_batch, positions
from caravan.data.permute import feistel, mix
from caravan.data.render import Rendered
from caravan.data.rows import Packing, Rows
from caravan.data.shards import Shards
from caravan.types import Batch, UserError


class PretrainLoader:
    """Rows of at most `sequence_length` tokens of one or several shards in random order, epoch after epoch.

    A row is cut into segments at document ends; each token predicts the next of its document, also over the
    end of the row. `batch_tokens` is a number, or a function of the step (a ramp): then offsets are running
    sums, computed once up to the step asked for. `packing` says how documents become rows (`rows.py`).

    Several shards: `phases` shares the rows of `steps` steps out among them (`mix.py`); each shard goes
    through its own epochs. `first_row` rows were read before step 0, at whatever batch size.
    """

    def __init__(
        self,
        shards: Shards | Sequence[Shards],
        batch_tokens: int | Callable[[int], int],
        sequence_length: int,
        seed: int = 0,
        *,
        packing: Packing = "chunk",
        phases: Sequence[Phase] = (),
        steps: int = 0,
        first_row: int = 0,
    ) -> None:
        several = [shards] if isinstance(shards, Shards) else list(shards)
        if any(len(one) < 2 for one in several):
            raise UserError("the shards hold no text to train on", "look at the facts of the corpus stage")
        if len(several) > 1 and any(len(one) < sequence_length for one in several):
            raise UserError(
                f"one of the shards holds less than a row of {sequence_length} tokens",
                "leave it out, or lower --context",
            )
        self.sequence_length = min(sequence_length, len(several[0]))
        self.sources = [
            Rows(one, self.sequence_length, packing, seed if k == 0 else mix(seed, k))
            for k, one in enumerate(several)
        ]
        self.rows = sum(source.rows for source in self.sources)
        """Rows of one epoch of everything."""
        self._batch_tokens = batch_tokens
        self._first_row = first_row
        self._offsets = [0]
        self._timetable = None if len(several) == 1 else self._planned(phases, max(1, steps))

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

    def _offset(self, step: int) -> int:
        """Rows read before a step."""
        if not callable(self._batch_tokens):
            return self._first_row + step * self._rows_at(0)
        self._extend(lambda: len(self._offsets) > step)
        return self._first_row + self._offsets[step]

    def _planned(self, phases: Sequence[Phase], steps: int) -> Timetable:
        """Rows per source and phase. A phase begins with a step."""
        if not phases:
            phases = [Phase(1.0, tuple(float(source.tokens) for source in self.sources))]
        edges = [0, *(round(steps * share) for share in accumulate(phase.share for phase in phases))]
        table = []
        for phase, first, last in zip(phases, edges, edges[1:], strict=False):
            rows = self._offset(last) - (self._offset(first) if first else 0)
            per_row = [
                w * source.rows / source.tokens for w, source in zip(phase.weights, self.sources, strict=True)
            ]
            table.append(apportion(per_row, rows))
        return Timetable(table)

    def rows_of(self, start: int, stop: int) -> list[tuple[Rows, int]]:
        """(source, row of it) for rows [start, stop) of the run: O(1) wherever they lie."""
        if self._timetable is None:
            return [(self.sources[0], int(row)) for row in self.sources[0].order(np.arange(start, stop))]
        owner, number = self._timetable.of(start, stop)
        row = np.empty_like(number)
        for k, source in enumerate(self.sources):
            row[owner == k] = source.order(number[owner == k])
        return [(self.sources[k], int(r)) for k, r in zip(owner, row, strict=True)]

    def _step(self, step: int) -> list[tuple[Rows, int]]:
        return self.rows_of(self._offset(step), self._offset(step + 1))

    def micro_batches(self, step: int, micro_tokens: int) -> list[Batch]:
        """All micro batches of a step, `micro_tokens` tokens each at most (one row at least)."""
        rows = self._step(step)
        each = max(1, micro_tokens // self.sequence_length)
        return [
            _rows_batch([piece for source, row in rows[i : i + each] for piece in source.pieces(row)])
            for i in range(0, len(rows), each)
        ]

    def normaliser(self, step: int) -> float:
        """Targets of the step: its tokens less those that end a document."""
        targets = sum(source.targets(row) for source, row in self._step(step))
        return float(max(1, targets))

    def stream(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the run, in the order in which they are read, whatever packing, batches or
        ranks: O(1) at any token; of packed rows after one look at the epoch."""
        if stop <= start:
            return np.zeros(0, np.int64)
        first = self._row_with(start)
        parts = [
            np.asarray(shards.tokens[a:b])
            for source, row in self.rows_of(first, self._row_with(stop - 1) + 1)
            for shards, a, b in source.pieces(row)
        ]
        return np.concatenate(parts)[start - self._tokens_before(first) :][: stop - start]

    def _row_with(self, token: int) -> int:
        """The row of the run that holds its n-th token: the first one looked at where all rows are of one
        length."""
        low = high = token // self.sequence_length
        while self._tokens_before(high + 1) <= token:
            high += high - low + 1
        return bisect_right(range(high + 1), token, low, high + 1, key=self._tokens_before) - 1

    def _tokens_before(self, row: int) -> int:
        counts = (row,) if self._timetable is None else self._timetable.counts(row)
        return sum(source.tokens_before(n) for source, n in zip(self.sources, counts, strict=True))

    def tokens_of(self, step: int) -> list[int]:
        """Tokens of each source in one step."""
        rows = self._step(step)
        return [
            sum(stop - start for source, row in rows if source is one for _, start, stop in one.pieces(row))
            for one in self.sources
        ]

    def tokens_read(self, steps: int, since: int = 0) -> list[int]:
        """Tokens of each source in steps [since, steps): the realised mix, exactly."""
        return [
            source.tokens_before(after) - source.tokens_before(before)
            for source, after, before in zip(
                self.sources, self._counts(steps), self._counts(since), strict=True
            )
        ]

    def _counts(self, step: int) -> tuple[int, ...]:
        row = self._offset(step)
        return (row,) if self._timetable is None else self._timetable.counts(row)


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
        if batch_tokens < 1:
            raise UserError(f"a step of {batch_tokens} tokens trains nothing", "give --batch-tokens above 0")
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.seed = seed
        total, longest = int(self.sizes.sum()), int(self.sizes.max())
        self.steps = max(1, min(round(total / batch_tokens), total // longest))
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
        yield _rows_batch([(shards, a, b) for a, b in rows[i : i + each]])


def _rows_batch(pieces: Sequence[tuple[Shards, int, int]]) -> Batch:
    """One batch of pieces (shards, start, stop)."""
    ids, targets, weights = [], [], []
    lengths: list[int] = []
    for shards, start, stop in pieces:
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
