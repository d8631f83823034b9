"""Rendered conversations to flat, padding-free batches, and which go together.

Legend: N flat tokens of a batch, S segments.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from caravan.data.render import Rendered
from caravan.types import Batch


@dataclass(frozen=True, slots=True)
class GroupBatch(Batch):
    """A batch whose segments belong together in groups: `groups[g]` segments each, in order, S in all."""

    groups: tuple[int, ...]
    """Segments per group."""
    index: tuple[int, ...]
    """Which group of the data set each is."""


def lm_batch(sequences: Sequence[Rendered]) -> Batch:
    """Segments end to end; every token predicts the next of its segment, with weight where that next is
    masked."""
    return _flat([s.ids for s in sequences], [s.mask for s in sequences])


def group_batch(groups: Sequence[Sequence[Rendered]], index: Sequence[int]) -> GroupBatch:
    """As `lm_batch`, with all candidates of one prompt side by side."""
    flat = lm_batch([r for group in groups for r in group])
    return GroupBatch(
        flat.ids_N,
        flat.pos_N,
        flat.lengths,
        flat.targets_N,
        flat.weight_N,
        tuple(len(g) for g in groups),
        tuple(index),
    )


def fit(sequence: Rendered, max_tokens: int) -> Rendered | None:
    """The sequence, or its turns up to the last answer that ends within `max_tokens`.

    None where nothing supervised would be left: the caller counts and names what it refuses.
    """
    if len(sequence) > max_tokens:
        mask = sequence.mask
        ends = [i for i in range(max_tokens) if mask[i] and not (i + 1 < len(mask) and mask[i + 1])]
        if not ends:
            return None
        sequence = Rendered(sequence.ids[: ends[-1] + 1], sequence.mask[: ends[-1] + 1])
    return sequence if any(sequence.mask[1:]) else None


def first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in bins of at most `budget` tokens: first-fit decreasing, ties by index, so always the same.

    An item above the budget has a bin of its own: packing always makes progress. Bins come in the order of
    their longest item; each bin's indices ascend.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    room = _Room(len(lengths))
    for i in order:
        at = room.first(lengths[i])
        if at is None:
            at = len(bins)
            bins.append([])
            room.set(at, max(0, budget - lengths[i]))
        else:
            room.set(at, room.of(at) - lengths[i])
        bins[at].append(i)
    return [sorted(b) for b in bins]


def best_fit(lengths: Sequence[int] | np.ndarray, budget: int) -> np.ndarray:
    """Bin of each item, int64: best-fit decreasing (Ding et al. 2024, arXiv 2404.10830).

    The longest first, each into the fullest bin that still takes it. All items of one length go at once: the
    tightest bin stays the tightest until it takes no more, so a bin with room r takes r // length of them in
    a row. Time grows with the number of different lengths, not of items. An item above the budget has a bin
    of its own.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    assert budget > 0 and (not len(sizes) or int(sizes.min()) > 0), "lengths and budget are above 0"
    out = np.empty(len(sizes), np.int64)
    order = np.argsort(-sizes, kind="stable")
    edges = [*np.flatnonzero(np.diff(sizes[order], prepend=-1)).tolist(), len(order)]
    free: dict[int, np.ndarray] = {}
    rooms: list[int] = []
    made = 0

    def give(room: int, bins: np.ndarray) -> None:
        if room and len(bins):
            if room not in free:
                insort(rooms, room)
            free[room] = np.concatenate([free[room], bins]) if room in free else bins

    for first, stop in pairwise(edges):
        items, size = order[first:stop], int(sizes[order[first]])
        while len(items):
            at = bisect_left(rooms, size)
            if at < len(rooms):
                room = rooms.pop(at)
                bins = free.pop(room)
            else:
                room = max(budget, size)
                bins = np.arange(made, made - (-len(items) // (room // size)), dtype=np.int64)
                made += len(bins)
            each = room // size
            full, rest = divmod(min(len(items), each * len(bins)), each)
            taken = np.repeat(bins[:full], each)
            if rest:
                taken = np.concatenate([taken, np.full(rest, bins[full])])
                give(room - rest * size, bins[full : full + 1])
            out[items[: len(taken)]] = taken
            give(room - each * size, bins[:full])
            give(room, bins[full + bool(rest) :])
            items = items[len(taken) :]
    return out


class _Room:
    """Room left per bin in a segment tree of maxima: the first bin with enough room in O(log n)."""

    def __init__(self, count: int) -> None:
        self.size = 1
        while self.size < max(1, count):
            self.size *= 2
        self.tree = [-1] * (2 * self.size)

    def of(self, at: int) -> int:
        return self.tree[self.size + at]

    def set(self, at: int, room: int) -> None:
        node = self.size + at
        self.tree[node] = room
        while node > 1:
            node //= 2
            self.tree[node] = max(self.tree[2 * node], self.tree[2 * node + 1])

    def first(self, need: int) -> int | None:
        if self.tree[1] < need or need <= 0:
            return None
        node = 1
        while node < self.size:
            node = 2 * node if self.tree[2 * node] >= need else 2 * node + 1
        return node - self.size


def _flat(rows: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]]) -> Batch:
    lengths = tuple(len(r) for r in rows)
    ids_N = np.concatenate([np.asarray(r, dtype=np.int64) for r in rows]) if rows else np.zeros(0, np.int64)
    mask_N = np.concatenate([np.asarray(m, dtype=bool) for m in masks]) if rows else np.zeros(0, bool)
    targets_N = np.zeros_like(ids_N)
    weight_N = np.zeros(len(ids_N), np.float32)
    targets_N[:-1] = ids_N[1:]
    weight_N[:-1] = mask_N[1:]
    last = np.cumsum(np.asarray(lengths, dtype=np.int64)) - 1
    targets_N[last], weight_N[last] = 0, 0.0
    return Batch(
        torch.from_numpy(ids_N),
        torch.from_numpy(positions(lengths)),
        lengths,
        torch.from_numpy(targets_N),
        torch.from_numpy(weight_N),
    )


def positions(lengths: Sequence[int]) -> np.ndarray:
    """int64 [N]: 0, 1, 2, … anew in each segment."""
    sizes = np.asarray(lengths, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    return np.arange(int(sizes.sum()), dtype=np.int64) - np.repeat(starts, sizes)
