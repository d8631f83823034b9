"""Attention inside each segment of a flat batch: the `attend` that training passes to the decoder.

N flat tokens, B rows of one bucket, T time within a row, H query heads, K key/value heads, E width of a query
or key head, V width of a value head.

Segments of like length are laid side by side in a bucket, padded on the right to its longest: right padding
is invisible to causal queries, and what the padded queries compute is thrown away. When all segments are
equally long (packed pre-training rows) nothing is gathered. Rows then go through torch's fused attention, or
through tiles (kernels/tiles.py) where that is slow (on a CPU) or does not know what is asked: windows, ALiBi,
capped scores, prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from caravan.kernels.tiles import Shape, Tiled

PAD_LIMIT = 1.25
"""A bucket may hold this many times its real tokens; beyond it, another bucket is cheaper."""


class Scoring(Protocol):
    """What attention must know of a layer's knobs (model.spec.Attn, which explains them, has more)."""

    @property
    def scale(self) -> float: ...
    @property
    def causal(self) -> bool: ...
    @property
    def window(self) -> int | None: ...
    @property
    def softcap(self) -> float | None: ...
    @property
    def alibi(self) -> bool: ...
    @property
    def alibi_scale(self) -> float: ...
    @property
    def alibi_max(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Pairs:
    """A learned bias for every pair of tokens: the row of a table that the score of query i and key j takes.

    X rows of the table, P texts side by side, T queries, S keys.
    """

    table_XH: Tensor
    ids_N: Tensor
    """The flat ids of the pass (or numbers that say as much)."""
    read: Callable[[Tensor], Tensor]
    """[P, S] ids of texts from their first token on -> [P, S] integers: what is known of each token."""
    row: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(j - i, known of i, known of j), broadcasting to [P, T, S] -> rows; below 0 where i must not see j."""
    ordered: bool = True
    """What the layer and the prefixes hide stays hidden; False: `row` alone decides."""


def alibi_slopes(heads: int, largest: float = 8.0) -> Tensor:
    """[H] fp32 slopes 2^(-largest i / m), i = 1 .. m, for m heads, a power of two. Other numbers of heads
    take every second slope of the next power of two first, then those in between (Press et al. 2021,
    arXiv:2108.12409)."""
    m = 1 << (heads - 1).bit_length()
    slopes = torch.exp2(-largest * torch.arange(1, m + 1, dtype=torch.float32) / m)
    return slopes if m == heads else torch.cat([slopes[1::2], slopes[0::2]])[:heads]


def reference_attention(
    lengths: Sequence[int],
    q_NHE: Tensor,
    k_NKE: Tensor,
    v_NKV: Tensor,
    attn: Scoring,
    prefix: Sequence[int] | None = None,
    pairs: Pairs | None = None,
) -> Tensor:
    """The definition: one segment, one head at a time, scores and softmax in fp32 or wider."""
    H = q_NHE.shape[1]
    group = H // k_NKE.shape[1]
    wide = torch.promote_types(q_NHE.dtype, torch.float32)
    slopes = alibi_slopes(H, attn.alibi_max).to(wide) * attn.alibi_scale
    segments, start = [], 0
    for s, length in enumerate(lengths):
        part = slice(start, start + length)
        start += length
        i, j = torch.arange(length)[:, None], torch.arange(length)[None]
        hidden = (j > i) if attn.causal else torch.zeros(length, length, dtype=torch.bool)
        if attn.window is not None:
            hidden = hidden | (i - j >= attn.window)
        if prefix is not None:
            hidden = hidden & ~((i < prefix[s]) & (j < prefix[s]))
        rows = None
        if pairs is not None:
            known = pairs.read(pairs.ids_N[part][None])[0]
            rows = pairs.row(j - i, known[:, None], known[None])
            hidden = (hidden & pairs.ordered) | (rows < 0)
        heads = []
        for h in range(H):
            q, k, v = (x[part, y].to(wide) for x, y in ((q_NHE, h), (k_NKE, h // group), (v_NKV, h // group)))
            scores = q @ k.T * attn.scale
            if attn.softcap is not None:
                scores = attn.softcap * torch.tanh(scores / attn.softcap)
            if attn.alibi:
                scores = scores + slopes[h] * (j - i)
            if pairs is not None and rows is not None:
                scores = scores + pairs.table_XH[rows.clamp_min(0), h].to(wide)
            heads.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v)
        segments.append(torch.stack(heads, 1))
    return torch.cat(segments).to(q_NHE.dtype)


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

    whole = True

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

    def __call__(
        self,
        index: int,
        q_NHE: Tensor,
        k_NKE: Tensor,
        v_NKV: Tensor,
        attn: Scoring,
        pairs: Pairs | None = None,
    ) -> Tensor:
        """[N, H, E] queries against keys [N, K, E] and values [N, K, V] -> [N, H, V]. The layer's number is
        not needed here."""
        assert q_NHE.shape[0] == self.tokens, (q_NHE.shape, self.tokens)
        if self._cells is None:
            return self._rows(self.buckets[0], q_NHE, k_NKE, v_NKV, attn, pairs)
        cells = [bucket.rows * bucket.width for bucket in self.buckets]
        qkv = [_Spread.apply(x, *self._cells).split(cells) for x in (q_NHE, k_NKE, v_NKV)]
        own: list[Pairs | None] = [None] * len(cells)
        if pairs is not None:
            ids = pairs.ids_N.index_select(0, self._cells[0]).split(cells)
            own = [replace(pairs, ids_N=of_bucket) for of_bucket in ids]
        parts = [
            self._rows(bucket, q, k, v, attn, its)
            for bucket, q, k, v, its in zip(self.buckets, *qkv, own, strict=True)
        ]
        return _Collect.apply(torch.cat(parts), self._cells[1])

    def _rows(
        self, bucket: Bucket, q: Tensor, k: Tensor, v: Tensor, attn: Scoring, pairs: Pairs | None
    ) -> Tensor:
        """[B*T, H, E] -> [B*T, H, V]: attention within each row of a bucket, whose cells `pairs` holds."""
        if pairs is None and self.prefix is None and is_plain(attn, bucket.width):
            if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float32):
                return Tiled.apply(q, k, v, bucket.rows, attn.scale, None)
            q, k, v = (x.view(bucket.rows, bucket.width, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
            grouped = q.shape[1] != k.shape[1]
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attn.scale, enable_gqa=grouped)
            return o.transpose(1, 2).flatten(0, 1)
        shape = self._shape(bucket, attn, q.shape[1], q.device)
        if pairs is None:
            return Tiled.apply(q, k, v, bucket.rows, attn.scale, shape)
        if not pairs.ordered:
            real = torch.tensor([self.lengths[s] for s in bucket.segments] * q.shape[1], device=q.device)
            shape = replace(shape, causal=False, window=None, lengths_R=real, prefix_R=None, reach=0)
        known_BT = pairs.read(pairs.ids_N.view(bucket.rows, bucket.width))
        shape = replace(shape, row=pairs.row, known_BT=known_BT)
        return Tiled.apply(q, k, v, bucket.rows, attn.scale, shape, pairs.table_XH)

    def _shape(self, bucket: Bucket, attn: Scoring, heads: int, device: torch.device) -> Shape:
        slopes = lengths = prefix = None
        reach = 0
        if attn.alibi:
            slopes = alibi_slopes(heads, attn.alibi_max).to(device) * attn.alibi_scale
            slopes = slopes.repeat_interleave(bucket.rows)
        if not attn.causal:
            lengths = torch.tensor([self.lengths[s] for s in bucket.segments] * heads, device=device)
        if self.prefix is not None:
            sizes = [self.prefix[s] for s in bucket.segments]
            prefix, reach = torch.tensor(sizes * heads, device=device), max(sizes)
        return Shape(attn.causal, attn.window, attn.softcap, slopes, lengths, prefix, reach)


def is_plain(attn: Scoring, width: int) -> bool:
    """Whether attention over rows of `width` is causal and nothing else."""
    windowed = attn.window is not None and attn.window < width
    return attn.causal and not windowed and attn.softcap is None and not attn.alibi
