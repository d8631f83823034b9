"""What the tests of recurrences share: gradients of two ways to compute one thing, and passes that go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from caravan.model import mixers
from caravan.model.spec import Layer

LENGTHS: list[tuple[int, ...]] = [(5, 70, 1, 33), (64, 64), (1, 1, 1), (7,), (129,)]
"""Segments shorter than, as long as and longer than a chunk, alone and in company, in no order."""


def agree(
    reference: Callable[..., tuple[Tensor, ...]],
    fast: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    bound: float = 1e-10,
) -> None:
    """Both give the same outputs and the same gradients of a weighted sum of them. fp64."""
    assert all(t.dtype == torch.float64 for t in inputs)
    results = []
    for function in (reference, fast):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        outputs = function(*leaves)
        total = sum((torch.linspace(-1, 2, y.numel()).view_as(y) * y).sum() for y in outputs)
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        results.append([*outputs, *(torch.zeros(1) if g is None else g for g in grads)])
    for n, (want, got) in enumerate(zip(*results, strict=True)):
        off = float((want - got).detach().abs().max())
        assert off <= bound * max(1.0, float(want.detach().abs().max())), (n, off)


class Pass:
    """An `attend` without attention: segments, and states that the next pass goes on from."""

    def __init__(self, lengths: Sequence[int], states: dict[int, dict[str, Tensor]] | None = None) -> None:
        self.lengths = tuple(lengths)
        self.before = states
        self.after: dict[int, dict[str, Tensor]] = {}

    def state(self, index: int) -> dict[str, Tensor] | None:
        return self.before[index] if self.before else None

    def keep(self, index: int, state: dict[str, Tensor]) -> None:
        self.after[index] = state


class Stack(nn.Module):
    """Mixers one after the other, as layers 0, 1, ..."""

    def __init__(self, d: int, layer: Layer, count: int) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(mixers.make(d, layer, i, None) for i in range(count))

    def forward(self, x_ND: Tensor, attend: Any) -> Tensor:
        for index, mixer in enumerate(self.mixers):
            x_ND = x_ND + mixer(x_ND, index, [], attend)
        return x_ND


def stirred(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter moved away from its initial value."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=draw).to(p), alpha=0.2)
    return module


def in_steps(module: nn.Module, rows: Sequence[Tensor], cuts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Rows fed piece by piece, each pass going on from the states of the one before; cuts[p][r] tokens of row
    r in pass p."""
    outputs: list[list[Tensor]] = [[] for _ in rows]
    states: dict[int, dict[str, Tensor]] | None = None
    done = [0] * len(rows)
    for cut in cuts:
        attend = Pass(cut, states)
        flat = torch.cat([row[n : n + c] for row, n, c in zip(rows, done, cut, strict=True)])
        for kept, part in zip(outputs, module(flat, attend).split(list(cut)), strict=True):
            kept.append(part)
        done = [n + c for n, c in zip(done, cut, strict=True)]
        states = attend.after
    return [torch.cat(parts) for parts in outputs]


def goes_on(module: nn.Module, d: int, dtype: torch.dtype = torch.float64, bound: float = 1e-10) -> None:
    """One pass over whole rows, rows alone, and rows in pieces (prefill, one token each, some more, ragged)
    are the same."""
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randn(n, d, generator=draw, dtype=torch.float64).to(dtype) for n in (40, 9, 46)]
    cuts = [(3, 5, 40), (1, 1, 1), (1, 1, 1), (34, 1, 1), (1, 1, 3)]
    with torch.no_grad():
        whole = module(torch.cat(rows), Pass([len(row) for row in rows])).split([len(row) for row in rows])
        alone = [module(row, Pass([len(row)])) for row in rows]
        pieces = in_steps(module, rows, cuts)
    for a, b, c in zip(whole, alone, pieces, strict=True):
        assert float((a - b).abs().max()) < bound
        assert float((a - c).abs().max()) < bound
