"""CPM-Ant and CPM-Bee (OpenBMB 2022, 2023): pre-norm layers whose scores carry a learned bias per bucket of
relative position, and per pair of segments where two tokens belong to different ones.

Both read their context in both directions and write causally behind it: key j is visible to query i if j is
context, or if i is not and j <= i. `attend.prefix` says how many tokens at the head of each segment are
context; without it CPM-Ant takes everything as context (as transformers does) and CPM-Bee nothing.

CPM-Ant puts learned prompt rows in front of every text. CPM-Bee has none; it turns each embedding by a
token's number among its like (`sub`), and its segments form a graph whose edges choose the bias.

N flat tokens, D width, V vocabulary, S flat segments, B rows of one group, T tokens of a row, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caravan.model.encoders.block import AsDecoder, Block, weights
from caravan.model.encoders.rows import Rows, relative, t5_buckets
from caravan.model.norms import make_norm
from caravan.model.spec import Layer, Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class CpmSpec(AsDecoder):
    """A whole CPM-Ant (`prompt` > 0) or CPM-Bee."""

    vocab: int
    d: int
    layers: tuple[Layer, ...]
    final_norm: Norm
    max_pos: int
    """Distances from here on share one bucket; taken as the longest sequence."""
    buckets: int
    """Rows of the bias table for positions, both directions together."""
    segments: int
    """CPM-Ant: types of segment, one further row per pair; CPM-Bee: further rows, one per kind of edge."""
    prompt: int = 0
    """CPM-Ant: prompt rows in front of each text."""
    prompt_kinds: int = 0
    """CPM-Ant: sets of prompt rows behind the vocabulary; the third is used."""
    distance_scale: float = 16.0
    """CPM-Bee: angle per `sub`."""
    tie: bool = False
    head: bool = True
    """False: no output head (reward models)."""

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return weights(Ant if self.prompt else Bee, self)


def visible(length: int, prefix: int, device: torch.device) -> Tensor:
    """[T, T] whether a key is visible: context in both directions, what follows it causally."""
    at = torch.arange(length, device=device)
    return (at < prefix) | (at <= at[:, None])


class Ant(nn.Module):
    """CPM-Ant, with the decoder's calling convention. Attributes as `Decoder`: spec, family, config, bare,
    kept."""

    TEXT = 2
    """Segment type of the text; prompt rows have 0."""

    def __init__(self, spec: CpmSpec, family: str = "cpmant", config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.spec, self.family, self.config = spec, family, dict(config or {})
        self.bare = False
        self.kept: dict[str, Tensor] = {}
        attn = spec.layers[0].attn
        assert attn is not None
        self.embed = nn.Embedding(spec.vocab + spec.prompt_kinds * spec.prompt, spec.d)
        self.seg = nn.Embedding(spec.segments, spec.d)
        self.rel = nn.Parameter(torch.zeros(spec.buckets + spec.segments**2, attn.n_head))
        self.blocks = nn.ModuleList(Block(spec.d, layer) for layer in spec.layers)
        self.norm = make_norm(spec.d, spec.final_norm)
        self.head = nn.Linear(spec.d, spec.vocab, bias=False) if spec.head and not spec.tie else None

    def forward(self, ids_N: Tensor, pos_N: Tensor, attend: Any) -> Tensor:
        """Flat ids -> [N, D]; the prompt rows are put in front and cut off again."""
        spec, device = self.spec, ids_N.device
        first = spec.vocab + 2 * spec.prompt
        prompt_P = torch.arange(first, first + spec.prompt, device=device)
        texts = ids_N.split(list(attend.lengths))
        whole_M = torch.cat([part for text in texts for part in (prompt_P, text)])
        lengths = [length + spec.prompt for length in attend.lengths]
        prefix = getattr(attend, "prefix", None) or attend.lengths
        rows = Rows(lengths, device, keys=prefix)
        is_text = [at >= spec.prompt for n in lengths for at in range(n)]
        text_M = torch.tensor(is_text, device=device)
        # python integers: a mask as index would wait for the device
        kept_N = torch.tensor([m for m, text in enumerate(is_text) if text], device=device)
        x_MD = self.embed(whole_M) + self.seg(text_M.long() * self.TEXT)
        bias = [self.bias(n, prefix[group[0]]) for n, group in zip(rows.lengths, rows.groups, strict=True)]
        for block in self.blocks:
            x_MD = block(x_MD, rows, bias)
        return self.norm(x_MD)[kept_N]

    def bias(self, length: int, prefix: int) -> Tensor:
        """[H, T, T] to add to the scores of a prompt and a text, `length` together."""
        spec, device = self.spec, self.rel.device
        kind_T = (torch.arange(length, device=device) >= spec.prompt).long() * self.TEXT
        near_TT = t5_buckets(relative(length, length, device), spec.buckets, spec.max_pos, both=True)
        pair_TT = spec.buckets + kind_T[:, None] * spec.segments + kind_T
        row_TT = torch.where(kind_T[:, None] == kind_T, near_TT, pair_TT)
        hidden = ~visible(length, spec.prompt + prefix, device)
        return F.embedding(row_TT, self.rel).permute(2, 0, 1).masked_fill(hidden, float("-inf"))

    def head_weight(self) -> Tensor:
        """[V, D] rows of the output head."""
        return self.embed.weight[: self.spec.vocab] if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return F.linear(hidden, self.head_weight())


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """What CPM-Bee knows about its tokens beyond their ids, flat [N] like them.

    Two tokens of one sample get the edge `edges[segment_i * count_i + segment_j + offset_i]` of their
    sequence's table: 0 means the same segment (position buckets apply), k > 0 the k-th kind of edge. Tokens
    of different samples (in-context examples) get kind 1, and see sample 0 alone.
    """

    sub_N: Tensor
    """Number of a token among its like; turns its embedding."""
    context_N: Tensor
    """bool: known text, seen in both directions."""
    sample_N: Tensor
    segment_N: Tensor
    count_N: Tensor
    """Segments of the token's sample."""
    offset_N: Tensor
    """Where the sample's edges start in the table."""
    edges: Sequence[Tensor]
    """Per sequence, its flat table of edge kinds."""

    @staticmethod
    def plain(lengths: Sequence[int], prefix: Sequence[int] | None, device: torch.device) -> Graph:
        """One sample of one segment each; the first `prefix` tokens are context."""
        zero_N = torch.zeros(sum(lengths), dtype=torch.int64, device=device)
        context = [torch.arange(n, device=device) < p
                   for n, p in zip(lengths, prefix or [0] * len(lengths), strict=True)]  # fmt: skip
        return Graph(
            sub_N=zero_N, context_N=torch.cat(context), sample_N=zero_N, segment_N=zero_N,
            count_N=zero_N + 1, offset_N=zero_N, edges=[zero_N[:1]] * len(lengths),
        )  # fmt: skip


class Bee(nn.Module):
    """CPM-Bee, with the decoder's calling convention. Attributes as `Decoder`: spec, family, config, bare,
    kept."""

    def __init__(self, spec: CpmSpec, family: str = "cpmbee", config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.spec, self.family, self.config = spec, family, dict(config or {})
        self.bare = False
        self.kept: dict[str, Tensor] = {}
        attn = spec.layers[0].attn
        assert attn is not None
        self.embed = nn.Embedding(spec.vocab, spec.d)
        self.rel = nn.Parameter(torch.zeros(spec.buckets + spec.segments, attn.n_head))
        self.blocks = nn.ModuleList(Block(spec.d, layer) for layer in spec.layers)
        self.norm = make_norm(spec.d, spec.final_norm)
        self.head = nn.Linear(spec.d, spec.vocab, bias=False) if spec.head and not spec.tie else None

    def tokens(self, ids_N: Tensor, sub_N: Tensor) -> Tensor:
        """[N, D] embeddings / sqrt(D), turned by `sub` as rotary embeddings are by position."""
        d = self.spec.d
        exponent = torch.arange(0, d, 2, device=ids_N.device, dtype=torch.float32) / d
        angle = (sub_N[:, None] * self.spec.distance_scale).float() * 10_000.0**-exponent
        x_ND = self.embed(ids_N) / d**0.5
        left, right = x_ND.chunk(2, 1)
        cos, sin = angle.cos().to(x_ND.dtype), angle.sin().to(x_ND.dtype)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], 1)

    def forward(self, ids_N: Tensor, pos_N: Tensor, attend: Any, graph: Graph | None = None) -> Tensor:
        """Flat ids -> [N, D]; without a graph every sequence is one segment."""
        device = ids_N.device
        if graph is None:
            graph = Graph.plain(attend.lengths, getattr(attend, "prefix", None), device)
        rows = Rows(attend.lengths, device)
        bias = self.biases(rows, graph, attend.lengths)
        x_ND = self.tokens(ids_N, graph.sub_N)
        for block in self.blocks:
            x_ND = block(x_ND, rows, bias)
        return self.norm(x_ND)

    def biases(self, rows: Rows, graph: Graph, lengths: Sequence[int]) -> list[Tensor]:
        """Per group [B, H, T, T] to add to the scores."""
        names = ("context_N", "sample_N", "segment_N", "count_N", "offset_N")
        parts = zip(rows.groups, *(rows.split(getattr(graph, name)) for name in names), strict=True)
        return [self._bias([graph.edges[s] for s in group], *known) for group, *known in parts]

    def _bias(
        self, edges: list[Tensor], context: Tensor, sample: Tensor, segment: Tensor, count: Tensor,
        offset: Tensor,
    ) -> Tensor:  # fmt: skip
        """[B, H, T, T] of one group; the other arguments are [B, T]."""
        spec, length = self.spec, context.shape[1]
        apart = sample[:, :, None] != sample[:, None]
        at = (segment * count + offset)[:, :, None] + segment[:, None]
        at = at.masked_fill(apart, 0)  # another sample's numbers mean nothing in this one's table
        kind = torch.stack([table[index] for table, index in zip(edges, at, strict=True)])
        kind = kind.masked_fill(apart, 1)
        near_TT = t5_buckets(relative(length, length, context.device), spec.buckets, spec.max_pos, both=True)
        row = torch.where(kind == 0, near_TT, kind - 1 + spec.buckets)
        order = torch.arange(length, device=context.device)
        seen = context[:, None] | (~context[:, :, None] & (order <= order[:, None]))
        seen = seen & ((sample[:, :, None] == 0) | ~apart)
        return F.embedding(row, self.rel).permute(0, 3, 1, 2).masked_fill(~seen[:, None], float("-inf"))

    def head_weight(self) -> Tensor:
        """[V, D] rows of the output head; the embedding itself when tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor, ext_XD: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., V], or [..., V + X] with `tokens` of X further words (unscaled) behind."""
        logits = F.linear(hidden / self.spec.d**0.5, self.head_weight())
        return logits if ext_XD is None else torch.cat([logits, F.linear(hidden, ext_XD)], -1)
