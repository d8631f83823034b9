"""T5 and Flan-T5 (Raffel et al. 2020, arXiv:1910.10683): an encoder, a decoder that looks at it, buckets of
relative positions instead of position embeddings.

What differs from the one decoder: scores carry no 1/sqrt(width); the bias table of a stack belongs to its
first layer and serves all of them; the encoder sees both ways and halves its buckets for it; the decoder
attends to the encoder as well. Version 1.0 multiplies the hidden states by d^-1/2 before the (tied) head,
later versions have a head of their own and do not.

N flat source tokens, M flat target tokens, S segments (pairs of source and target), D width, V vocabulary,
H heads, E head width, B rows of one group, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caravan.model import ffn
from caravan.model.encoders.block import AsDecoder, Block, SelfAttention, weights
from caravan.model.encoders.rows import Rows, attention, relative, t5_buckets
from caravan.model.norms import make_norm
from caravan.model.spec import Layer, Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Spec(AsDecoder):
    """A whole T5. `layers` are the encoder's; the decoder has `dec_layers` of the same shape."""

    vocab: int
    d: int
    layers: tuple[Layer, ...]
    dec_layers: int
    """Layers of the decoder."""
    buckets: int = 32
    max_distance: int = 128
    """Distances from here on share one bucket."""
    max_pos: int = 512
    """Tokens that the model was trained on at once; longer ones work, further apart they look alike."""
    final_norm: Norm
    tie: bool = True
    """The output head is the embedding."""
    head: bool = True
    """False: the encoder alone, neither decoder nor output head (reward models)."""
    logit_scale: float = 1.0
    """On the hidden states before the head: d^-1/2 in version 1.0."""
    start: int = 0
    """Id that the decoder starts from."""

    @property
    def parameters(self) -> int:
        """Number of weights, tied head counted once."""
        return weights(T5, self)


class CrossAttention(nn.Module):
    """Queries of the target on keys and values of its source."""

    def __init__(self, d: int, layer: Layer) -> None:
        super().__init__()
        assert layer.attn is not None
        self.n_head = layer.attn.n_head
        inner = self.n_head * layer.attn.head_dim
        self.q = nn.Linear(d, inner, bias=False)
        self.kv = nn.Linear(d, 2 * inner, bias=False)
        self.o = nn.Linear(inner, d, bias=False)

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Rows of k and v."""
        return {"kv.weight": (self.kv.out_features // 2,) * 2}

    def memory(self, x: Tensor) -> list[Tensor]:
        """Encoder output [..., D] -> keys and values [..., H, E]."""
        return [p.unflatten(-1, (self.n_head, -1)) for p in self.kv(x).chunk(2, -1)]

    def forward(self, x_MD: Tensor, target: Rows, memory_ND: Tensor, source: Rows) -> Tensor:
        q_MHE = self.q(x_MD).unflatten(-1, (self.n_head, -1))
        k_NHE, v_NHE = self.memory(memory_ND)
        parts = zip(target.split(q_MHE), source.split(k_NHE), source.split(v_NHE), strict=True)
        return self.o(target.join([attention(q, k, v, None, 1.0) for q, k, v in parts]).flatten(1))


class DecoderBlock(nn.Module):
    """x + self(norm(x)), x + cross(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, d: int, layer: Layer) -> None:
        super().__init__()
        assert layer.ffn is not None
        self.n1, self.a = make_norm(d, layer.norm), SelfAttention(d, layer)
        self.nx, self.x = make_norm(d, layer.norm), CrossAttention(d, layer)
        self.n2, self.ffn = make_norm(d, layer.norm), ffn.make(d, layer.ffn)


class Stack(nn.Module):
    """Layers, the bias table they share, and the last norm."""

    def __init__(self, spec: T5Spec, count: int, causal: bool) -> None:
        super().__init__()
        layer = spec.layers[0]
        assert layer.attn is not None
        self.spec, self.causal = spec, causal
        self.rel = nn.Embedding(spec.buckets, layer.attn.n_head)
        self.blocks = nn.ModuleList((DecoderBlock if causal else Block)(spec.d, layer) for _ in range(count))
        self.norm = make_norm(spec.d, spec.final_norm)

    def written(self) -> Iterator[DecoderBlock]:
        """The layers of a decoder."""
        assert self.causal
        return (cast(DecoderBlock, block) for block in self.blocks)

    def bias(self, queries: int, keys: int, start: int = 0) -> Tensor:
        """[H, queries, keys] to add to the scores; -inf on keys to the right if causal."""
        distance = relative(queries, keys, self.rel.weight.device, start)
        bucket = t5_buckets(distance, self.spec.buckets, self.spec.max_distance, not self.causal)
        bias_HQK = self.rel(bucket).permute(2, 0, 1)
        return bias_HQK.masked_fill(distance > 0, float("-inf")) if self.causal else bias_HQK


@dataclass(slots=True)
class Cache:
    """What a group of B targets under generation keeps: per layer self keys and values [B, T, H, E], and
    those of the source, made once."""

    own: list[list[Tensor] | None]
    source: list[list[Tensor]]
    length: int = 0


class T5(nn.Module):
    """Encoder and decoder. `forward` is the encoder, with the decoder's calling convention; `decode`,
    `logits` and `greedy` are the rest.

    Attributes as `Decoder`: spec, family, config, bare, kept. HEADS: what goes when the encoder is all that
    is wanted.
    """

    HEADS = ("head", "dec")

    def __init__(self, spec: T5Spec, family: str = "t5", config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.spec, self.family, self.config = spec, family, dict(config or {})
        self.bare = False
        self.kept: dict[str, Tensor] = {}
        self.embed = nn.Embedding(spec.vocab, spec.d)
        self.enc = Stack(spec, len(spec.layers), causal=False)
        self.dec = Stack(spec, spec.dec_layers, causal=True) if spec.head else None
        own = spec.head and not spec.tie
        self.head = nn.Linear(spec.d, spec.vocab, bias=False) if own else None

    def forward(self, ids_N: Tensor, pos_N: Tensor, attend: Any) -> Tensor:
        """Flat source ids -> [N, D] encoder output. Positions are relative; `pos_N` is not needed."""
        rows = Rows(attend.lengths, ids_N.device)
        bias = [self.enc.bias(length, length) for length in rows.lengths]
        x_ND = self.embed(ids_N)
        for block in self.enc.blocks:
            x_ND = block(x_ND, rows, bias)
        return self.enc.norm(x_ND)

    def decode(
        self, ids_M: Tensor, target_lengths: Sequence[int], memory_ND: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """Decoder states [M, D] of flat target ids (each starting with `spec.start`), segment s looking at
        segment s of the encoder output."""
        assert self.dec is not None, "this T5 is an encoder only"
        assert len(target_lengths) == len(lengths) and min(*lengths, *target_lengths) > 0
        device = ids_M.device
        target = Rows(target_lengths, device, keys=lengths)
        source = Rows(lengths, device, keys=target_lengths)
        assert target.groups == source.groups
        bias = [self.dec.bias(length, length) for length in target.lengths]
        x_MD = self.embed(ids_M)
        for block in self.dec.written():
            x_MD = x_MD + block.a(block.n1(x_MD), target, bias)
            x_MD = x_MD + block.x(block.nx(x_MD), target, memory_ND, source)
            x_MD = x_MD + block.ffn(block.n2(x_MD))
        return self.dec.norm(x_MD)

    def head_weight(self) -> Tensor:
        """[V, D] rows of the output head; the embedding itself when tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] decoder states -> [..., V]."""
        return F.linear(hidden * self.spec.logit_scale, self.head_weight())

    # -- generation ----------------------------------------------------------------------------------------
    def start(self, memory_BTD: Tensor) -> Cache:
        """The cache of a group of sources of one length."""
        assert self.dec is not None
        source = [block.x.memory(memory_BTD) for block in self.dec.written()]
        return Cache([None] * len(source), source)

    def step(self, ids_B: Tensor, cache: Cache) -> Tensor:
        """One more target token per row -> [B, V] logits of the next."""
        assert self.dec is not None
        x_B1D = self.embed(ids_B[:, None])
        bias = self.dec.bias(1, cache.length + 1, cache.length)
        for i, block in enumerate(self.dec.written()):
            q, *new = block.a.qkv(block.n1(x_B1D))
            old = cache.own[i]
            k, v = new if old is None else [torch.cat(pair, 1) for pair in zip(old, new, strict=True)]
            cache.own[i] = [k, v]
            x_B1D = x_B1D + block.a.o(attention(q, k, v, bias, 1.0).flatten(2))
            q = block.x.q(block.nx(x_B1D)).unflatten(-1, (block.x.n_head, -1))
            k, v = cache.source[i]
            x_B1D = x_B1D + block.x.o(attention(q, k, v, None, 1.0).flatten(2))
            x_B1D = x_B1D + block.ffn(block.n2(x_B1D))
        cache.length += 1
        return self.logits(self.dec.norm(x_B1D))[:, 0]

    @torch.no_grad()
    def greedy(self, ids_N: Tensor, attend: Any, max_tokens: int, stop: int | None = None) -> list[list[int]]:
        """Likeliest target of every source, token by token; ends behind `stop` or after `max_tokens`."""
        rows = Rows(attend.lengths, ids_N.device)
        memory = rows.split(self(ids_N, torch.zeros_like(ids_N), attend))
        answers: list[list[int]] = [[] for _ in attend.lengths]
        for group, memory_BTD in zip(rows.groups, memory, strict=True):
            cache = self.start(memory_BTD)
            last_B = torch.full((len(group),), self.spec.start, device=ids_N.device)
            open_rows = set(range(len(group)))
            for _ in range(max_tokens):
                last_B = self.step(last_B, cache).argmax(-1)
                for row, token in enumerate(last_B.tolist()):
                    if row in open_rows:
                        answers[group[row]].append(token)
                        if token == stop:
                            open_rows.discard(row)
                if not open_rows:
                    break
        return answers
