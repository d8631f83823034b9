"""Attention of equal rows by tiles of queries: batched matrix products over just the keys that are seen.

B rows of T tokens, H query heads, K key/value heads, E width of a query or key head, V width of a value head,
R = H * B independent problems, Q queries of a tile.

On a CPU torch's fused attention is slow (in bf16, and its backward above all), while these products run near
the speed of the machine. Tiles nobody sees (above the diagonal, beyond a window) are never computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 128
"""Queries per tile."""
TILE_CELLS = 1 << 20
"""Scores per tile over all rows: 2 MB in bf16, so that a tile is still in the cache when it is read again."""
KEEP_LENGTH = 1024
"""Probabilities of rows up to this length are kept for the backward pass; those of longer rows are
recomputed."""


@dataclass(frozen=True, slots=True)
class Shape:
    """All that makes attention within a bucket's rows differ from plain causal attention. R = H * B rows,
    heads first."""

    causal: bool
    window: int | None
    softcap: float | None
    slopes_R: Tensor | None
    """ALiBi slope of each row."""
    lengths_R: Tensor | None
    """Real tokens of each row, where queries could see the padding behind them."""
    prefix_R: Tensor | None
    reach: int
    """The longest prefix."""
    row: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """Which row of a table each pair of tokens takes (kernels.attention.Pairs)."""
    known_BT: Tensor | None = None
    """What it goes by, beside the distance."""

    def pairs(self, rows: slice, queries: tuple[int, int], keys: tuple[int, int], heads: int) -> Tensor:
        """[R, Q, K] where the biases of a tile lie in a flat table [X * heads]; below 0 where there is
        none."""
        assert self.row is not None and self.known_BT is not None
        device = self.known_BT.device
        i = torch.arange(*queries, device=device)[:, None]
        j = torch.arange(*keys, device=device)[None]
        known_q, known_k = self.known_BT[:, slice(*queries), None], self.known_BT[:, None, slice(*keys)]
        row_BQK = self.row(j - i, known_q, known_k)
        texts = len(row_BQK)
        r = torch.arange(heads * texts, device=device)[rows]
        return row_BQK[r % texts] * heads + (r // texts)[:, None, None]

    def keys(self, first: int, end: int, width: int) -> tuple[int, int]:
        """Keys [a, b) outside of which queries [first, end) see nothing."""
        low = 0 if self.window is None or first < self.reach else max(0, first - self.window + 1)
        high = end if self.causal else width
        return low, max(high, self.reach) if first < self.reach else high

    def bias(self, rows: slice, queries: tuple[int, int], keys: tuple[int, int], like: Tensor) -> Tensor:
        """[R or 1, Q, K] to be added to the scores of a tile: ALiBi, and -inf where nothing is seen."""
        i = torch.arange(*queries, device=like.device)[:, None]
        j = torch.arange(*keys, device=like.device)[None]
        hidden = (j > i) if self.causal else torch.zeros_like(j > i)
        if self.window is not None:
            hidden = hidden | (i - j >= self.window)
        hidden = hidden[None]
        if self.prefix_R is not None:
            p = self.prefix_R[rows, None, None]
            hidden = hidden & ~((i < p) & (j < p))
        if self.lengths_R is not None:
            hidden = hidden | (j >= self.lengths_R[rows, None, None])
        bias = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
        if self.slopes_R is not None:
            bias = bias + self.slopes_R[rows, None, None].to(like.dtype) * (j - i)
        return bias.masked_fill(hidden, float("-inf"))


def _heads_first(x: Tensor, rows: int, repeat: int = 1) -> Tensor:
    """[B*T, K, E] -> [K*repeat*B, T, E] contiguous; every key/value head is repeated for its query heads."""
    x = x.view(rows, -1, *x.shape[1:]).permute(2, 0, 1, 3)
    if repeat > 1:
        x = x.unsqueeze(1).expand(-1, repeat, -1, -1, -1)
    return x.reshape(-1, *x.shape[-2:])


def _tokens_first(x: Tensor, rows: int) -> Tensor:
    """[H*B, T, E] -> [B*T, H, E]: the inverse."""
    return x.view(-1, rows, *x.shape[1:]).permute(1, 2, 0, 3).reshape(-1, x.shape[0] // rows, x.shape[-1])


Tile = tuple[slice, int, int, int, int]
"""Rows, and queries [first, end) that see keys [low, high)."""


def _tiles(rows: int, width: int, shape: Shape | None) -> Iterator[Tile]:
    at_once = max(1, TILE_CELLS // (min(TILE, width) * width))
    for r in range(0, rows, at_once):
        for first in range(0, width, TILE):
            end = min(first + TILE, width)
            low, high = (0, end) if shape is None else shape.keys(first, end, width)
            yield slice(r, min(r + at_once, rows)), first, end, low, high


def _probabilities(q: Tensor, k: Tensor, scale: float, hidden: Tensor, tile: Tile) -> Tensor:
    """Plain causal tiles: only the last keys of a tile are hidden from some of its queries."""
    r, first, end, _, _ = tile
    scores = torch.empty(q[r].shape[0], end - first, end, dtype=q.dtype, device=q.device)
    torch.baddbmm(scores, q[r, first:end], k[r, :end].transpose(1, 2), beta=0, alpha=scale, out=scores)
    scores[:, :, first:end] += hidden[: end - first, : end - first]
    return scores.softmax(-1)


def _shaped(
    q: Tensor, k: Tensor, scale: float, shape: Shape, tile: Tile, table_XH: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Probabilities of a tile of any shape, and the derivative of the cap; scores in fp32 or wider."""
    r, first, end, low, high = tile
    scores = torch.bmm(q[r, first:end], k[r, low:high].transpose(1, 2))
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)).mul_(scale)
    slope = None
    if shape.softcap is not None:
        bent = scores.div_(shape.softcap).tanh_()
        slope = 1 - bent.square()
        scores = bent * shape.softcap
    scores += shape.bias(r, (first, end), (low, high), scores)
    if table_XH is not None:
        at = shape.pairs(r, (first, end), (low, high), table_XH.shape[1])
        scores += table_XH.flatten()[at.clamp_min(0)].masked_fill_(at < 0, float("-inf"))
    return scores.softmax(-1).to(q.dtype), slope


def reference_softmax_gradient(p: Tensor, dp: Tensor) -> Tensor:
    """Gradient of the scores from probabilities and their gradient: p (dp - sum(p dp))."""
    ds = p * dp
    return ds.sub_(p * ds.sum(-1, keepdim=True))


@functools.cache
def _native_softmax_gradient() -> bool:
    """Whether torch's own operator, which is not public, is there and says the same."""
    p = torch.linspace(-1, 1, 12, dtype=torch.bfloat16).view(3, 4).softmax(-1)
    dp = torch.linspace(1, -2, 12, dtype=torch.bfloat16).view(3, 4)
    try:
        got = torch._softmax_backward_data(dp, p, -1, p.dtype)
    except (AttributeError, TypeError, RuntimeError):
        return False
    return torch.allclose(got.float(), reference_softmax_gradient(p.float(), dp.float()), atol=0.01)


def softmax_gradient(p: Tensor, dp: Tensor) -> Tensor:
    """Same as `reference_softmax_gradient`, in one pass where torch has it."""
    if not torch.compiler.is_compiling() and _native_softmax_gradient():  # a self-test cannot be traced
        return torch._softmax_backward_data(dp, p, -1, p.dtype)
    return reference_softmax_gradient(p, dp)


class Tiled(torch.autograd.Function):
    """Attention of B equal rows by tiles of queries, exact in any float type.

    Plain causal attention (shape None) rounds scores to the input's type before the softmax, as the usual
    unfused attention does; the softmax itself and all sums are fp32 inside. Backward: dV = P'dO, dP = dO V',
    dS = P (dP - rowsum(P dP)), the gradient of a table's rows is the sum of dS where they were taken; times
    the derivative of the cap, dQ = s dS K, dK = s dS'Q.
    """

    @staticmethod
    def forward(
        ctx: Any, q_NHE: Tensor, k_NKE: Tensor, v_NKV: Tensor, rows: int, scale: float, shape: Shape | None,
        table_XH: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        repeat = q_NHE.shape[1] // k_NKE.shape[1]
        q = _heads_first(q_NHE, rows)
        k, v = (_heads_first(x, rows, repeat) for x in (k_NKE, v_NKV))
        hidden = torch.full((TILE, TILE), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
        out, kept = q.new_empty(*q.shape[:2], v.shape[2]), []
        keep = q.shape[1] <= KEEP_LENGTH and (shape is None or shape.softcap is None)
        for tile in _tiles(q.shape[0], q.shape[1], shape):
            r, first, end, low, high = tile
            if shape is None:
                p = _probabilities(q, k, scale, hidden, tile)
            else:
                p, _ = _shaped(q, k, scale, shape, tile, table_XH)
            out[r, first:end] = torch.bmm(p, v[r, low:high])
            if keep:
                kept.append(p)
        ctx.rows, ctx.scale, ctx.repeat, ctx.shape = rows, scale, repeat, shape
        ctx.save_for_backward(q, k, v, hidden, table_XH, *kept)
        return _tokens_first(out, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_NHV: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, hidden, table_XH, *kept = ctx.saved_tensors
        dtable = None
        if table_XH is not None:
            exact = torch.promote_types(table_XH.dtype, torch.float32)
            dtable = torch.zeros_like(table_XH, dtype=exact).flatten()
        do = _heads_first(do_NHV, ctx.rows)
        single = q.shape[1] <= TILE
        wide = q.dtype if single else torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for i, tile in enumerate(_tiles(q.shape[0], q.shape[1], ctx.shape)):
            r, first, end, low, high = tile
            slope = None
            if kept:
                p = kept[i]
            elif ctx.shape is None:
                p = _probabilities(q, k, ctx.scale, hidden, tile)
            else:
                p, slope = _shaped(q, k, ctx.scale, ctx.shape, tile, table_XH)
            g = do[r, first:end]
            dp = torch.bmm(g, v[r, low:high].transpose(1, 2))
            ds = softmax_gradient(p, dp)
            if dtable is not None:  # where nothing is seen the gradient is zero, whichever row it goes to
                at = ctx.shape.pairs(r, (first, end), (low, high), table_XH.shape[1]).clamp_min(0)
                dtable.scatter_add_(0, at.flatten(), ds.flatten().to(dtable.dtype))
            ds = ds.mul_(ctx.scale)
            if slope is not None:
                ds = ds.mul_(slope.to(ds.dtype))
            dq[r, first:end] = torch.bmm(ds, k[r, low:high])
            dk[r, low:high] += torch.bmm(ds.transpose(1, 2), q[r, first:end])
            dv[r, low:high] += torch.bmm(p.transpose(1, 2), g)
        if ctx.repeat > 1:
            dk, dv = (x.view(-1, ctx.repeat, ctx.rows * x.shape[1], x.shape[2]).sum(1) for x in (dk, dv))
            dk, dv = (x.view(-1, q.shape[1], x.shape[2]) for x in (dk, dv))
        dq, dk, dv = (_tokens_first(x.to(q.dtype), ctx.rows) for x in (dq, dk, dv))
        if dtable is not None:
            dtable = dtable.view_as(table_XH).to(table_XH.dtype)
        return dq, dk, dv, None, None, None, dtable
