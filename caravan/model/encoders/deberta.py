"""DeBERTa v1 to v3 (He et al. 2021, arXiv:2006.03654 and 2111.09543): encoders whose scores add up content to
content, content to position and position to content.

    score(i, j) = (q_i k_j + q_i pk[r(i - j)] + k_j pq[r(i - j)]) / sqrt(E * terms)

pk and pq are projections of one table of relative positions that all layers share. Version 1 clamps i - j;
version 2 puts far distances into logarithmic buckets, normalises the table, may project it with the
content's own matrices (share_att_key) and may add a convolution beside the first layer.

N flat tokens, D width, H heads, E head width, B rows of one group, T tokens of a row, R rows of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from caravan.model import ffn
from caravan.model.activations import ACTIVATIONS
from caravan.model.encoders.block import AsDecoder, weights
from caravan.model.encoders.rows import Rows, relative
from caravan.model.norms import make_norm
from caravan.model.spec import Activation, Layer, Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Conv:
    """A convolution over the embeddings, added to the output of the first layer (v2 xlarge)."""

    width: int
    groups: int
    act: Activation


@dataclass(frozen=True, slots=True, kw_only=True)
class DebertaSpec(AsDecoder):
    """A whole DeBERTa encoder."""

    version: int
    """1: q, k, v fused per head, no bias on k; 2: three projections with biases (v2 and v3)."""
    vocab: int
    d: int
    layers: tuple[Layer, ...]
    norm: Norm
    max_pos: int
    pos: bool = False
    """A table of absolute positions is added to the embedding."""
    type_vocab: int = 0
    """Rows of the table of segment types; all our tokens are of type 0."""
    embed_dim: int = 0
    """Width of the embedding where it is not d; 0 where it is."""
    max_relative: int = 0
    """Distances from here on look alike; 0: no relative positions."""
    buckets: int = 0
    """Logarithmic buckets per direction; 0: one row of the table per distance."""
    terms: tuple[str, ...] = ("c2p", "p2c")
    """Which position terms the scores have."""
    share_att_key: bool = False
    rel_norm: bool = False
    conv: Conv | None = None
    head: bool = False
    """There is none: masked-language-model heads are kept beside the weights and written back."""
    tie: bool = True

    @property
    def span(self) -> int:
        """Half the rows of the table."""
        return self.buckets or self.max_relative

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return weights(Deberta, self)


def log_buckets(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Near distances exactly, far ones in logarithmic steps, the sign kept (He et al. 2021, v2)."""
    middle = buckets // 2
    size = distance.abs().clamp_min(middle)
    # both logarithms in fp32: the furthest distance must come out as exactly the last step
    steps = torch.log(torch.tensor((max_distance - 1) / middle, device=distance.device))
    step = torch.log(size / middle) / steps * (middle - 1)
    far = torch.ceil(step).long() + middle
    return torch.where(distance.abs() <= middle, distance, far * distance.sign())


def table_rows(length: int, spec: DebertaSpec, device: torch.device) -> Tensor:
    """[T, T] row of the table for each query and key."""
    distance = -relative(length, length, device)
    if spec.buckets:
        distance = log_buckets(distance, spec.buckets, spec.max_relative)
    return (distance + spec.span).clamp(0, 2 * spec.span - 1)


class Attention(nn.Module):
    """Disentangled self-attention."""

    def __init__(self, spec: DebertaSpec, layer: Layer) -> None:
        super().__init__()
        assert layer.attn is not None
        self.spec, self.n_head = spec, layer.attn.n_head
        self.inner = self.n_head * layer.attn.head_dim
        first = spec.version == 1
        self.qkv = nn.Linear(spec.d, 3 * self.inner, bias=False) if first else None
        self.q_bias = nn.Parameter(torch.zeros(self.inner)) if first else None
        self.v_bias = nn.Parameter(torch.zeros(self.inner)) if first else None
        self.proj = None if first else nn.Linear(spec.d, 3 * self.inner)
        own = spec.max_relative > 0 and not spec.share_att_key
        self.pk = nn.Linear(spec.d, self.inner, bias=not first) if own and "c2p" in spec.terms else None
        self.pq = nn.Linear(spec.d, self.inner) if own and "p2c" in spec.terms else None
        self.o = nn.Linear(self.inner, spec.d)
        self.scale = (layer.attn.head_dim * (1 + len(spec.terms))) ** -0.5

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Rows of q, k and v."""
        return {f"{'qkv' if self.proj is None else 'proj'}.weight": (self.inner,) * 3}

    def content(self, x_ND: Tensor) -> list[Tensor]:
        """q, k, v [N, H, E]."""
        if self.proj is not None:
            parts = self.proj(x_ND).chunk(3, 1)
        else:
            q, k, v = self.qkv(x_ND).chunk(3, 1)  # type: ignore[misc]
            parts = (q + self.q_bias, k, v + self.v_bias)
        return [part.unflatten(1, (self.n_head, -1)) for part in parts]

    def positions(self, table_RD: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Keys and queries [H, R, E] of the table; None for a term the model lacks."""
        if self.spec.share_att_key and self.proj is not None:
            pq, pk, _ = self.proj(table_RD).chunk(3, 1)
            keys = pk if "c2p" in self.spec.terms else None
            queries = pq if "p2c" in self.spec.terms else None
        else:
            keys = None if self.pk is None else self.pk(table_RD)
            queries = None if self.pq is None else self.pq(table_RD)
        heads = [None if x is None else x.unflatten(1, (self.n_head, -1)).transpose(0, 1)
                 for x in (keys, queries)]  # fmt: skip
        return heads[0], heads[1]

    def forward(self, x_ND: Tensor, rows: Rows, grids: Sequence[Tensor], table_RD: Tensor | None) -> Tensor:
        """`grids[g]` is `table_rows` of group g."""
        q, k, v = (rows.split(x) for x in self.content(x_ND))
        keys, queries = (None, None) if table_RD is None else self.positions(table_RD)
        parts = []
        for q_BTHE, k_BTHE, v_BTHE, row_TT in zip(q, k, v, grids, strict=True):
            q_BHTE, k_BHTE, v_BHTE = (x.transpose(1, 2) for x in (q_BTHE, k_BTHE, v_BTHE))
            score = q_BHTE @ k_BHTE.transpose(2, 3)
            shape = score.shape
            if keys is not None:
                score = score + (q_BHTE @ keys.transpose(1, 2)).gather(3, row_TT.expand(shape))
            if queries is not None:
                met_BHKR = k_BHTE @ queries.transpose(1, 2)
                score = score + met_BHKR.gather(3, row_TT.T.expand(shape)).transpose(2, 3)
            weight = (score * self.scale).softmax(-1)
            parts.append((weight @ v_BHTE).transpose(1, 2))
        return self.o(rows.join(parts).flatten(1))


class Block(nn.Module):
    """norm(x + attention(x)), then norm(x + ffn(x))."""

    def __init__(self, spec: DebertaSpec, layer: Layer) -> None:
        super().__init__()
        assert layer.ffn is not None
        self.mix, self.p1 = Attention(spec, layer), make_norm(spec.d, layer.norm)
        self.ffn, self.p2 = ffn.make(spec.d, layer.ffn), make_norm(spec.d, layer.norm)

    def forward(self, x_ND: Tensor, rows: Rows, grids: Sequence[Tensor], table_RD: Tensor | None) -> Tensor:
        x_ND = self.p1(x_ND + self.mix(x_ND, rows, grids, table_RD))
        return self.p2(x_ND + self.ffn(x_ND))


class Convolution(nn.Module):
    """norm(y + act(conv(x))) within each segment."""

    def __init__(self, d: int, conv: Conv, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv1d(d, d, conv.width, padding=(conv.width - 1) // 2, groups=conv.groups)
        self.norm = make_norm(d, norm)
        self.act = ACTIVATIONS[conv.act]

    def forward(self, x_ND: Tensor, y_ND: Tensor, rows: Rows) -> Tensor:
        seen = [self.conv(x_BTD.transpose(1, 2)).transpose(1, 2) for x_BTD in rows.split(x_ND)]
        return self.norm(y_ND + self.act(rows.join(seen)))


class Deberta(nn.Module):
    """The encoder, with the decoder's calling convention. Attributes as `Decoder`: spec, family, config,
    bare, kept."""

    def __init__(
        self, spec: DebertaSpec, family: str = "deberta_v2", config: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.spec, self.family, self.config = spec, family, dict(config or {})
        self.bare = False
        self.kept: dict[str, Tensor] = {}
        narrow = spec.embed_dim or spec.d
        self.embed = nn.Embedding(spec.vocab, narrow)
        self.pos = nn.Embedding(spec.max_pos, narrow) if spec.pos else None
        self.seg = nn.Embedding(spec.type_vocab, narrow) if spec.type_vocab else None
        self.pin = nn.Linear(narrow, spec.d, bias=False) if spec.embed_dim else None
        self.embed_norm = make_norm(spec.d, spec.norm)
        self.rel = nn.Embedding(2 * spec.span, spec.d) if spec.max_relative else None
        self.rel_norm = make_norm(spec.d, spec.norm) if spec.rel_norm else None
        self.blocks = nn.ModuleList(Block(spec, layer) for layer in spec.layers)
        self.conv = Convolution(spec.d, spec.conv, spec.norm) if spec.conv else None

    def forward(self, ids_N: Tensor, pos_N: Tensor, attend: Any) -> Tensor:
        """Flat ids and positions -> [N, D]."""
        rows = Rows(attend.lengths, ids_N.device)
        x_ND = self.embed(ids_N)
        if self.pos is not None:
            x_ND = x_ND + self.pos(pos_N)
        if self.seg is not None:
            x_ND = x_ND + self.seg.weight[0]
        x_ND = start_ND = self.embed_norm(x_ND if self.pin is None else self.pin(x_ND))
        grids, table_RD = self._table(rows, ids_N.device)
        for i, block in enumerate(self.blocks):
            x_ND = block(x_ND, rows, grids, table_RD)
            if i == 0 and self.conv is not None:
                x_ND = self.conv(start_ND, x_ND, rows)
        return x_ND

    def _table(self, rows: Rows, device: torch.device) -> tuple[list[Tensor], Tensor | None]:
        """Which row each pair looks up, and the rows that anyone does."""
        if self.rel is None:
            return [torch.zeros(1, 1, dtype=torch.int64)] * len(rows.lengths), None
        grids = [table_rows(length, self.spec, device) for length in rows.lengths]
        low, high = 0, 2 * self.spec.span
        if not self.spec.buckets:  # one row per distance: short texts read the middle of a long table
            furthest = max(rows.lengths)
            low, high = max(low, self.spec.span - furthest), min(high, self.spec.span + furthest)
        table_RD = self.rel.weight[low:high]
        if self.rel_norm is not None:
            table_RD = self.rel_norm(table_RD)
        return [grid - low for grid in grids], table_RD
