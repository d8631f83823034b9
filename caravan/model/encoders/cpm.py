"""CPM-Ant and CPM-Bee (OpenBMB 2022, 2023): the one decoder with a learned bias per bucket of relative
position, and per pair of segments where two tokens belong to different ones.

Both read their context in both directions and write causally behind it. Which tokens are context is said by
`attend.prefix`, as for every prefix model; a pass without one takes everything as context for CPM-Ant (as
transformers does) and nothing for CPM-Bee.

CPM-Ant has learned prompt rows in front of every text: in a pass over whole texts they are put there and cut
off again, in generation the engine does that (`CpmSpec.lead`).

CPM-Bee reads objects, one segment per key and per text, each beginning with `<s>`: `<s><root></s>`, then
`<s>key</s><s>text</s>` over and over. How two segments stand to each other (up and down the tree) chooses the
bias between their tokens. Here a text's segments are counted from its `<s>`; what is written behind the key
`<ans>` is the answer, and what stands before it the context. `Graph` says all of it by hand, for objects in
objects and examples in context. `sub`, a token's number among its like, turns its embedding.

N flat tokens, D width, V vocabulary, P texts side by side, T queries, S keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caravan.kernels.attention import Pairs, Segments
from caravan.model.decoder import Attend, Decoder
from caravan.model.encoders.block import weights
from caravan.model.encoders.rows import t5_buckets
from caravan.model.spec import Attn, Spec

DEPTH = 8
"""Steps up and down between two segments are counted to 7."""
FLAT_EDGES = 2 * DEPTH + 3
"""Rows of the bias table that the segments of a flat object need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpmSpec(Spec):
    """A whole CPM-Ant (`prompt` > 0) or CPM-Bee. Distances from `max_pos` on share one bucket; it is taken as
    the longest sequence."""

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
    bos: int | None = None
    """CPM-Bee: id of `<s>`, with which a segment begins; None: a text is one segment."""

    @property
    def lead(self) -> tuple[int, ...]:
        """Ids of the prompt rows."""
        first = self.vocab + 2 * self.prompt
        return tuple(range(first, first + self.prompt))

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return weights(Ant if self.prompt else Bee, self)


class _Biased:
    """An `attend` whose calls carry a learned bias."""

    def __init__(self, attend: Attend, pairs: Pairs) -> None:
        self.attend, self.pairs = attend, pairs
        self.lengths, self.prefix, self.routed = attend.lengths, attend.prefix, attend.routed
        self.whole = attend.whole
        self.state, self.keep = attend.state, attend.keep

    def __call__(
        self, index: int, q_NHE: Tensor, k_NKE: Tensor, v_NKV: Tensor, attn: Attn, pairs: Pairs | None = None
    ) -> Tensor:
        return self.attend(index, q_NHE, k_NKE, v_NKV, attn, self.pairs)


class Ant(Decoder):
    """CPM-Ant."""

    TEXT = 2
    """Segment type of the text; prompt rows have 0."""
    spec: CpmSpec

    def __init__(self, spec: CpmSpec, family: str = "cpmant", config: dict[str, Any] | None = None) -> None:
        super().__init__(spec, family, config)
        self.embed = nn.Embedding(spec.vocab + spec.prompt_kinds * spec.prompt, spec.d)
        self.rel = nn.Parameter(torch.zeros(spec.buckets + spec.segments**2, spec.attns[0].n_head))

    def forward(
        self,
        ids_N: Tensor | None,
        pos_N: Tensor,
        attend: Attend,
        inputs_embeds: Tensor | None = None,
        types_N: Tensor | None = None,
    ) -> Tensor:
        """Flat ids -> [N, D]; whole texts get their prompt rows here. Segment types follow from the ids."""
        assert ids_N is not None and inputs_embeds is None and types_N is None
        if not attend.whole:
            return self._read(ids_N, pos_N, attend)
        device, lead = ids_N.device, self.spec.lead
        lead_P = torch.tensor(lead, device=device)
        texts = ids_N.split(list(attend.lengths))
        whole_M = torch.cat([part for text in texts for part in (lead_P, text)])
        lengths = [len(lead) + length for length in attend.lengths]
        prefix = attend.lengths if attend.prefix is None else attend.prefix
        both = Segments(lengths, device, tuple(len(lead) + n for n in prefix))
        # python integers: a mask as index would wait for the device
        ends = zip(itertools.accumulate(lengths), attend.lengths, strict=True)
        kept = [m for end, n in ends for m in range(end - n, end)]
        return self._read(whole_M, whole_M, both)[torch.tensor(kept, device=device)]

    def _read(self, ids_M: Tensor, pos_M: Tensor, attend: Attend) -> Tensor:
        pairs = Pairs(self.rel, ids_M, self._types, self._row)
        return super().forward(ids_M, pos_M, _Biased(attend, pairs), types_N=self._types(ids_M))

    def _types(self, ids: Tensor) -> Tensor:
        return (ids < self.spec.vocab).long() * self.TEXT

    def _row(self, distance: Tensor, q: Tensor, k: Tensor) -> Tensor:
        spec = self.spec
        near = t5_buckets(distance, spec.buckets, spec.max_pos, both=True)
        return torch.where(q == k, near, spec.buckets + q * spec.segments + k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """What CPM-Bee's data format knows about tokens beyond their ids, flat [N] like them.

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

    def pairs(self, table_XH: Tensor, spec: CpmSpec, lengths: Sequence[int]) -> Pairs:
        """The bias of every pair; tokens stand for themselves."""
        device = self.sub_N.device
        sizes = torch.tensor([0] + [len(table) for table in self.edges]).cumsum(0)[:-1]
        start_N = (sizes.repeat_interleave(torch.tensor(lengths))).to(device) + self.offset_N
        edges = torch.cat(list(self.edges))

        def row(distance: Tensor, i: Tensor, j: Tensor) -> Tensor:
            apart = self.sample_N[i] != self.sample_N[j]
            at = self.segment_N[i] * self.count_N[i] + start_N[i] + self.segment_N[j]
            # another sample's numbers mean nothing in this one's table
            kind = edges[at.masked_fill(apart, 0)].masked_fill(apart, 1)
            near = t5_buckets(distance, spec.buckets, spec.max_pos, both=True)
            seen = self.context_N[j] | (~self.context_N[i] & (j <= i))
            seen = seen & ((self.sample_N[i] == 0) | ~apart)
            return torch.where(kind == 0, near, kind - 1 + spec.buckets).masked_fill(~seen, -1)

        tokens_N = torch.arange(len(self.sub_N), device=device)
        return Pairs(table_XH, tokens_N, lambda tokens: tokens, row, ordered=False)


class Bee(Decoder):
    """CPM-Bee."""

    spec: CpmSpec

    def __init__(self, spec: CpmSpec, family: str = "cpmbee", config: dict[str, Any] | None = None) -> None:
        super().__init__(spec, family, config)
        self.rel = nn.Parameter(torch.zeros(spec.buckets + spec.segments, spec.attns[0].n_head))

    def turned(self, ids_N: Tensor, sub_N: Tensor) -> Tensor:
        """[N, D] embeddings turned by `sub` as rotary embeddings are by position."""
        d = self.spec.d
        exponent = torch.arange(0, d, 2, device=ids_N.device, dtype=torch.float32) / d
        angle = (sub_N[:, None] * self.spec.distance_scale).float() * 10_000.0**-exponent
        x_ND = self.embed(ids_N)
        left, right = x_ND.chunk(2, 1)
        cos, sin = angle.cos().to(x_ND.dtype), angle.sin().to(x_ND.dtype)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], 1)

    def tokens(self, ids_X: Tensor, sub_X: Tensor) -> Tensor:
        """[X, D] input vectors of words that are not in the table, for `logits`."""
        return self.turned(ids_X, sub_X) * self.spec.embed_scale

    def forward(
        self,
        ids_N: Tensor | None,
        pos_N: Tensor,
        attend: Attend,
        inputs_embeds: Tensor | None = None,
        types_N: Tensor | None = None,
        graph: Graph | None = None,
    ) -> Tensor:
        """Flat ids -> [N, D]; without a graph segments begin at every `<s>`."""
        assert ids_N is not None and inputs_embeds is None and types_N is None
        if graph is None:
            pairs = Pairs(self.rel, ids_N, self._segments, self._row)
            return super().forward(ids_N, pos_N, _Biased(attend, pairs))
        pairs = graph.pairs(self.rel, self.spec, attend.lengths)
        x_ND = self.turned(ids_N, graph.sub_N)
        return super().forward(None, pos_N, _Biased(attend, pairs), inputs_embeds=x_ND)

    def _segments(self, ids_PS: Tensor) -> Tensor:
        """Number of each token's segment in its text."""
        if self.spec.bos is None:
            return torch.zeros_like(ids_PS)
        return ((ids_PS == self.spec.bos).cumsum(1) - 1).clamp_min(0)

    def _row(self, distance: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Rows between tokens of the segments root, key, text, key, text, ...: steps up from the one to the
        part of the tree that holds both, and down from there to the other."""
        near = t5_buckets(distance, self.spec.buckets, self.spec.max_pos, both=True)
        up, down = (torch.where(s == 0, 0, 2 - s % 2) for s in (q, k))
        family = ((q + 1 == k) & (q % 2 == 1)) | ((k + 1 == q) & (k % 2 == 1))  # a key and its own text
        edge = (up - family.long()) * DEPTH + down - family.long()
        return torch.where(q == k, near, self.spec.buckets + edge)

    def logits(self, hidden: Tensor, ext_XD: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., V], or [..., V + X] with `tokens` of X further words behind."""
        logits = super().logits(hidden)
        return logits if ext_XD is None else torch.cat([logits, F.linear(hidden, ext_XD)], -1)
