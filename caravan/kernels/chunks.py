"""Segments of a flat batch cut into chunks, so that recurrences run in parallel inside and among chunks.

N flat tokens, S segments, C tokens per chunk, M chunks in all.

A recurrence over tokens becomes: something parallel within every chunk, a short loop over chunks that carries
the state, something parallel again. Chunks lie step by step: first the first chunk of every segment (longest
segments first), then the second chunk of every segment that has one, and so on. The chunks of one step are
therefore one slice, and the segments still alive are the first rows of the state. A chunk never holds tokens
of two segments, which is why nothing leaks from one document into the next; the last chunk of a segment is
filled up with zeros, which recurrences must treat as "no token".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Chunks:
    """Where every token lies."""

    size: int
    """C."""
    active: tuple[int, ...]
    """Segments that have a k-th chunk."""
    cell_N: Tensor
    """Place of every token in [M * C]."""
    order_S: Tensor
    """Segments, longest first: row r of a carried state belongs to segment order_S[r]."""
    rank_S: Tensor
    """The inverse: row of every segment."""
    straight: bool
    """Cells are the tokens in their order: nothing needs to be moved."""

    @property
    def count(self) -> int:
        """M."""
        return sum(self.active)

    def steps(self) -> Iterator[tuple[int, slice]]:
        """(segments alive, their chunks) of every step."""
        done = 0
        for alive in self.active:
            yield alive, slice(done, done + alive)
            done += alive

    def spread(self, x_N: Tensor) -> Tensor:
        """[N, ...] -> [M, C, ...], zeros where there is no token."""
        if self.straight:
            return x_N.view(self.count, self.size, *x_N.shape[1:])
        cells = Spread.apply(x_N, self.cell_N, self.count * self.size)
        return cells.view(self.count, self.size, *x_N.shape[1:])

    def collect(self, x_MC: Tensor) -> Tensor:
        """[M, C, ...] -> [N, ...]: the inverse of `spread`."""
        flat = x_MC.reshape(self.count * self.size, *x_MC.shape[2:])
        return flat if self.straight else Collect.apply(flat, self.cell_N)

    def tokens(self, dtype: torch.dtype) -> Tensor:
        """[M, C]: 1 where there is a token, 0 where there is none."""
        real = torch.zeros(self.count * self.size, dtype=dtype, device=self.cell_N.device)
        return real.index_fill(0, self.cell_N, 1.0).view(self.count, self.size)


@functools.lru_cache(maxsize=16)
def plan(lengths: tuple[int, ...], size: int, device: torch.device) -> Chunks:
    """Chunks of at most `size` tokens (a power of two) for segments of these lengths, none of them empty."""
    assert lengths and min(lengths) > 0, lengths
    assert size & (size - 1) == 0, size
    size = min(size, 1 << (max(lengths) - 1).bit_length())
    counts = [-(-n // size) for n in lengths]
    order = sorted(range(len(lengths)), key=lambda s: -counts[s])
    active = tuple(sum(c > k for c in counts) for k in range(max(counts)))
    offsets = [sum(active[:k]) for k in range(len(active))]
    order_S = torch.tensor(order, device=device)
    rank_S = order_S.argsort()
    length_S = torch.tensor(lengths, device=device)
    total = sum(lengths)
    segment_N = torch.arange(len(lengths), device=device).repeat_interleave(length_S, output_size=total)
    start_S = length_S.cumsum(0) - length_S
    place_N = torch.arange(total, device=device) - start_S[segment_N]
    offset_K = torch.tensor(offsets, device=device)
    cell_N = (offset_K[place_N // size] + rank_S[segment_N]) * size + place_N % size
    straight = len(active) == 1 and all(n == size for n in lengths)
    return Chunks(size, active, cell_N, order_S, rank_S, straight)


class Spread(torch.autograd.Function):
    """Tokens [N, ...] to cells [cells, ...]; cells without a token are zero and give no gradient."""

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, cell_N: Tensor, cells: int) -> Tensor:
        ctx.save_for_backward(cell_N)
        return x_N.new_zeros(cells, *x_N.shape[1:]).index_copy_(0, cell_N, x_N)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (cell_N,) = ctx.saved_tensors
        return grad.index_select(0, cell_N), None, None


class Collect(torch.autograd.Function):
    """Cells [cells, ...] to tokens [N, ...]; what cells without a token hold is left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cell_N: Tensor) -> Tensor:
        ctx.save_for_backward(cell_N)
        ctx.cells = x.shape[0]
        return x.index_select(0, cell_N)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        (cell_N,) = ctx.saved_tensors
        return grad_N.new_zeros(ctx.cells, *grad_N.shape[1:]).index_copy_(0, cell_N, grad_N), None


def carry(chunks: Chunks, first_S: Tensor, step: Callable[[Tensor, slice], Tensor]) -> tuple[Tensor, Tensor]:
    """Run a state through the chunks.

    `first_S` [S, ...] is the state before every segment; `step(state, chunks)` gives the state after the
    chunks of a slice. Returns the state before every chunk [M, ...] and after every segment [S, ...].
    """
    state, before, finished = first_S.index_select(0, chunks.order_S), [], []
    for alive, part in chunks.steps():
        if alive < state.shape[0]:
            finished.append(state[alive:])
            state = state[:alive]
        before.append(state)
        state = step(state, part)
    finished.append(state)
    return torch.cat(before), torch.cat(finished[::-1]).index_select(0, chunks.rank_S)


def wide(x: Tensor) -> Tensor:
    """At least fp32: what every recurrence is computed in, whatever the weights are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
