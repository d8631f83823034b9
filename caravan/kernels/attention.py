"""Causal attention inside each segment of a flat batch: the `attend` that training passes to the decoder.

N flat tokens, B rows of one bucket, T time within a row, H query heads, K key/value heads, E head width,
R = H * B independent causal problems.

Segments of like length are laid side by side in a bucket, padded on the right to its longest: right padding
is invisible to causal queries, and what the padded queries compute is thrown away. When all segments are
equally long (packed pre-training rows) nothing is gathered.

In bf16 on a CPU torch's fused attention is slow (its backward above all), so the rows go through tiles of
queries against the keys they may see: batched matrix products, which run near the speed of the machine, and
a softmax. Tiles above the diagonal are never computed. Elsewhere torch's own fused attention is used.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PAD_LIMIT = 1.25
"""A bucket may hold this many times its real tokens; beyond it, another bucket is cheaper."""
TILE = 128
"""Queries per tile."""
TILE_CELLS = 1 << 20
"""Scores per tile over all rows: 2 MB in bf16, so that a tile is still in the cache when it is read again."""
KEEP_LENGTH = 1024
"""Probabilities of rows up to this length are kept for the backward pass; those of longer rows are
recomputed."""


def reference_attention(
    lengths: Sequence[int], q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, scale: float
) -> Tensor:
    """The definition: one segment, one head at a time, scores and softmax in fp32 or wider."""
    group = q_NHE.shape[1] // k_NKE.shape[1]
    wide = torch.promote_types(q_NHE.dtype, torch.float32)
    rows, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        start += length
        heads = []
        for h in range(q_NHE.shape[1]):
            q, k, v = (
                q_NHE[part, h].to(wide),
                k_NKE[part, h // group].to(wide),
                v_NKE[part, h // group].to(wide),
            )
            scores = q @ k.T * scale
            hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
            heads.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v)
        rows.append(torch.stack(heads, 1))
    return torch.cat(rows).to(q_NHE.dtype)


class Scoring(Protocol):
    """What attention must know of a layer's knobs (model.spec.Attn has more)."""

    @property
    def scale(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Bucket:
    """Segments that go through one call, as `rows` rows of `width` cells."""

    rows: int
    width: int
    segments: tuple[int, ...]
    """Which segment each row holds."""


def buckets(lengths: Sequence[int]) -> list[Bucket]:
    """Group segments, longest first, while padding stays below PAD_LIMIT. Empty segments are skipped."""
    if len(set(lengths)) == 1:
        return [Bucket(len(lengths), lengths[0], tuple(range(len(lengths))))] if lengths[0] else []
    groups: list[list[int]] = []
    real = 0
    for s in sorted((s for s, length in enumerate(lengths) if length), key=lambda s: -lengths[s]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= PAD_LIMIT * (real + lengths[s]):
            groups[-1].append(s)
        else:
            groups.append([s])
            real = 0
        real += lengths[s]
    return [Bucket(len(group), lengths[group[0]], tuple(group)) for group in groups]


def _cells(plan: Sequence[Bucket], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(token of every cell [C], cell of every token [N]); a padding cell repeats its row's last token."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    size = torch.tensor(lengths)
    token_of_cell, cell_of_token = [], torch.empty(sum(lengths), dtype=torch.int64)
    done = 0
    for bucket in plan:
        chosen = torch.tensor(bucket.segments)
        begin_B1, length_B1 = starts[chosen][:, None], size[chosen][:, None]
        step_1T = torch.arange(bucket.width)[None]
        take = (begin_B1 + torch.minimum(step_1T, length_B1 - 1)).flatten()
        real = (step_1T < length_B1).flatten().nonzero().squeeze(1)
        cell_of_token[take[real]] = real + done
        token_of_cell.append(take)
        done += len(take)
    return torch.cat(token_of_cell), cell_of_token


class _Spread(torch.autograd.Function):
    """Tokens [N, ...] to cells [C, ...]. Nobody reads what a padding cell gives, so its gradient is
    exactly zero and the backward pass can gather, too, instead of adding up."""

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, token_of_cell: Tensor, cell_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(cell_of_token)
        return x_N.index_select(0, token_of_cell)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_C: Tensor) -> tuple[Tensor | None, ...]:
        return grad_C.index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """Cells [C, ...] to tokens [N, ...], padding left out."""

    @staticmethod
    def forward(ctx: Any, x_C: Tensor, cell_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(cell_of_token)
        ctx.cells = len(x_C)
        return x_C.index_select(0, cell_of_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        (cell_of_token,) = ctx.saved_tensors
        return grad_N.new_zeros(ctx.cells, *grad_N.shape[1:]).index_copy_(0, cell_of_token, grad_N), None


class Segments:
    """`attend` for a flat batch of segments: planned once per batch, called once per layer.

    Gradients are exact and no token sees another segment. `lengths` are python integers whose sum is N.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        prefix: tuple[int, ...] | None = None,
    ) -> None:
        self.lengths = tuple(lengths)
        self.prefix = prefix
        self.routed: dict[int, tuple[Tensor, Tensor]] = {}
        self.tokens = sum(self.lengths)
        self.buckets = buckets(self.lengths)
        self._cells: tuple[Tensor, Tensor] | None = None
        if len(self.buckets) != 1 or self.buckets[0].rows * self.buckets[0].width != self.tokens:
            token_of_cell, cell_of_token = _cells(self.buckets, self.lengths)
            self._cells = token_of_cell.to(device), cell_of_token.to(device)

    def state(self, index: int) -> dict[str, Tensor] | None:
        """None: in training every segment starts afresh."""
        return None

    def keep(self, index: int, state: dict[str, Tensor]) -> None:
        """In training nothing comes after the last token."""

    def __call__(self, index: int, q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, attn: Scoring) -> Tensor:
        """[N, H, E] queries against [N, K, E] keys and values -> [N, H, E]. The layer index is not needed
        here."""
        scale = attn.scale
        assert q_NHE.shape[0] == self.tokens, (q_NHE.shape, self.tokens)
        tiled = q_NHE.dtype == torch.bfloat16 and q_NHE.device.type == "cpu"
        if self._cells is None:
            return _attend_rows(self.buckets[0], q_NHE, k_NKE, v_NKE, scale, tiled)
        cells = [bucket.rows * bucket.width for bucket in self.buckets]
        qkv = [_Spread.apply(x, *self._cells).split(cells) for x in (q_NHE, k_NKE, v_NKE)]
        parts = [
            _attend_rows(bucket, q, k, v, scale, tiled)
            for bucket, q, k, v in zip(self.buckets, *qkv, strict=True)
        ]
        return _Collect.apply(torch.cat(parts), self._cells[1])


def _attend_rows(bucket: Bucket, q: Tensor, k: Tensor, v: Tensor, scale: float, tiled: bool) -> Tensor:
    """[B*T, H, E] -> [B*T, H, E]: causal attention within each row of a bucket."""
    if tiled:
        return Tiled.apply(q, k, v, bucket.rows, scale)
    q, k, v = (x.view(bucket.rows, bucket.width, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o.transpose(1, 2).flatten(0, 1)


def _heads_first(x: Tensor, rows: int, repeat: int = 1) -> Tensor:
    """[B*T, K, E] -> [K*repeat*B, T, E] contiguous; every key/value head is repeated for its query heads."""
    x = x.view(rows, -1, *x.shape[1:]).permute(2, 0, 1, 3)
    if repeat > 1:
        x = x.unsqueeze(1).expand(-1, repeat, -1, -1, -1)
    return x.reshape(-1, *x.shape[-2:])


def _tokens_first(x: Tensor, rows: int) -> Tensor:
    """[H*B, T, E] -> [B*T, H, E]: the inverse."""
    return x.view(-1, rows, *x.shape[1:]).permute(1, 2, 0, 3).reshape(-1, x.shape[0] // rows, x.shape[-1])


def _tiles(rows: int, width: int) -> Iterator[tuple[slice, int, int]]:
    """(rows, first query, end) of every tile; queries [first, end) see keys [0, end)."""
    at_once = max(1, TILE_CELLS // (min(TILE, width) * width))
    for r in range(0, rows, at_once):
        for first in range(0, width, TILE):
            yield slice(r, min(r + at_once, rows)), first, min(first + TILE, width)


def _probabilities(
    q: Tensor, k: Tensor, scale: float, hidden: Tensor, tile: tuple[slice, int, int]
) -> Tensor:
    r, first, end = tile
    scores = torch.empty(q[r].shape[0], end - first, end, dtype=q.dtype)
    torch.baddbmm(scores, q[r, first:end], k[r, :end].transpose(1, 2), beta=0, alpha=scale, out=scores)
    scores[:, :, first:end] += hidden[: end - first, : end - first]
    return scores.softmax(-1)


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
    if _native_softmax_gradient():
        return torch._softmax_backward_data(dp, p, -1, p.dtype)
    return reference_softmax_gradient(p, dp)


class Tiled(torch.autograd.Function):
    """Causal attention of B equal rows by tiles of queries, for CPUs in bf16 (right in any float type).

    Scores are rounded to the input's type before the softmax, as in the usual unfused attention; the softmax
    itself and all sums are fp32 inside. Backward: dV = P'dO, dP = dO V', dS = P (dP - rowsum(P dP)),
    dQ = s dS K, dK = s dS'Q.
    """

    @staticmethod
    def forward(ctx: Any, q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, rows: int, scale: float) -> Tensor:
        repeat = q_NHE.shape[1] // k_NKE.shape[1]
        q = _heads_first(q_NHE, rows)
        k, v = (_heads_first(x, rows, repeat) for x in (k_NKE, v_NKE))
        hidden = torch.full((TILE, TILE), float("-inf"), dtype=q.dtype).triu(1)
        out, kept = torch.empty_like(q), []
        for tile in _tiles(q.shape[0], q.shape[1]):
            r, first, end = tile
            p = _probabilities(q, k, scale, hidden, tile)
            out[r, first:end] = torch.bmm(p, v[r, :end])
            if q.shape[1] <= KEEP_LENGTH:
                kept.append(p)
        ctx.rows, ctx.scale, ctx.repeat = rows, scale, repeat
        ctx.save_for_backward(q, k, v, hidden, *kept)
        return _tokens_first(out, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_NHE: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, hidden, *kept = ctx.saved_tensors
        do = _heads_first(do_NHE, ctx.rows)
        single = q.shape[1] <= TILE
        wide = q.dtype if single else torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for i, tile in enumerate(_tiles(q.shape[0], q.shape[1])):
            r, first, end = tile
            p = kept[i] if kept else _probabilities(q, k, ctx.scale, hidden, tile)
            g = do[r, first:end]
            dp = torch.bmm(g, v[r, :end].transpose(1, 2))
            ds = softmax_gradient(p, dp).mul_(ctx.scale)
            dq[r, first:end] = torch.bmm(ds, k[r, :end])
            dk[r, :end] += torch.bmm(ds.transpose(1, 2), q[r, first:end])
            dv[r, :end] += torch.bmm(p.transpose(1, 2), g)
        if ctx.repeat > 1:
            dk, dv = (x.view(-1, ctx.repeat, ctx.rows * x.shape[1], x.shape[2]).sum(1) for x in (dk, dv))
            dk, dv = (x.view(-1, q.shape[1], q.shape[2]) for x in (dk, dv))
        dq, dk, dv = (_tokens_first(x.to(q.dtype), ctx.rows) for x in (dq, dk, dv))
        return dq, dk, dv, None, None
