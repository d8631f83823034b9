"""The one decoder: every family is this module with another Spec.

N flat tokens, D width, V vocabulary, H query heads, K key/value heads, E head width, F rotary frequencies.

`forward` takes flat tokens with explicit positions and returns hidden states; it knows nothing of masks,
caches, padding or losses. What a token may see is the business of `attend`, the context object of one pass
(training: kernels.attention.Segments; generation: the engine's paged cache). Choices between knobs are made
in `__init__`, so that every forward of a model takes the same path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from caravan.kernels.attention import Pairs
from caravan.model import ffn as ffns
from caravan.model import mixers
from caravan.model.activations import ACTIVATIONS
from caravan.model.norms import make_norm
from caravan.model.positions import (
    Angles,
    by_length,
    inverse_frequencies,
    log_growth,
    sinusoid,
    two_streams,
)
from caravan.model.spec import Attn, Layer, Rope, Spec


class Attend(Protocol):
    """The context of one forward pass over a flat batch of segments."""

    lengths: tuple[int, ...]
    """Tokens of each segment (training: documents; generation: the rows of the step), in sum N."""
    prefix: tuple[int, ...] | None
    """Per segment, how many of its first tokens see each other in both directions; None: nobody."""
    routed: dict[int, tuple[Tensor, Tensor]]
    """Layer -> (router probabilities [N, X], chosen experts [N, top_k]), put here by MoE layers."""
    whole: bool
    """Segments are whole texts; False: parts of texts whose beginnings were computed in earlier passes."""

    def __call__(
        self,
        index: int,
        q_NHE: Tensor,
        k_NKE: Tensor,
        v_NKV: Tensor,
        attn: Attn,
        pairs: Pairs | None = None,
        /,
    ) -> Tensor:
        """Attention of layer `index` -> [N, H, V]. Who sees whom and how scores are shaped is said by
        `attn`, a learned bias by `pairs`; the width of values may differ from that of keys."""
        ...

    def state(self, index: int) -> dict[str, Tensor] | None:
        """Recurrent state of layer `index` before the first token of each segment, tensors [S, ...]; None:
        every segment starts afresh. An FFN's state has the index -1 - layer."""
        ...

    def keep(self, index: int, state: dict[str, Tensor]) -> None:
        """Hand over the state after the last token of each segment."""
        ...


class Block(nn.Module):
    """One Layer. Its residual form is bound once: see Layer for what each means."""

    def __init__(self, d: int, layer: Layer, index: int, rope: int | None, wide: bool = False) -> None:
        super().__init__()
        both = layer.ffn is not None
        self.n1 = make_norm(d, layer.norm if layer.pre and layer.pre_mixer else None)
        self.n2 = make_norm(d, layer.norm if layer.pre and both and not layer.shared_norm else None)
        self.p1 = make_norm(d, layer.norm if layer.post != "none" else None)
        self.p2 = make_norm(d, layer.norm if layer.post != "none" and both else None)
        self.mix = mixers.make(d, layer, index, rope)
        self.ffn = ffns.make(d, layer.ffn) if layer.ffn is not None else None
        self.alpha, self.beta = layer.alpha, layer.beta
        weighted = layer.res_from_norm or layer.alpha != 1 or layer.beta != 1 or layer.post == "sum"
        plain = layer.pre and layer.pre_mixer and layer.post == "none" and not weighted and not wide
        self.source = _second if layer.res_from_norm else _first
        self.inner, self.outer = (_through, _apply) if layer.post == "sum" else (_apply, _through)
        self.narrow = _narrow if wide else _as_it_is
        if layer.parallel:
            assert both and layer.post == "none" and not layer.res_from_norm, layer
            self.run = self._shared if layer.shared_norm else self._parallel
        elif both:
            self.run = self._plain if plain else self._sequential
        else:
            self.run = self._mixer_only

    def _plain(self, x_ND: Tensor, index: int, angles: Angles, attend: Attend) -> Tensor:
        x_ND = x_ND + self.mix(self.n1(x_ND), index, angles, attend)
        return x_ND + self.ffn(self.n2(x_ND), index, attend)  # type: ignore[misc]

    def _mixer_only(self, x_ND: Tensor, index: int, angles: Angles, attend: Attend) -> Tensor:
        h_ND = self.narrow(self.n1(x_ND), self.n1)
        y_ND = self.inner(self.p1, self.mix(h_ND, index, angles, attend))
        return self.outer(self.p1, self.alpha * self.source(x_ND, h_ND) + self.beta * y_ND)

    def _sequential(self, x_ND: Tensor, index: int, angles: Angles, attend: Attend) -> Tensor:
        x_ND = self._mixer_only(x_ND, index, angles, attend)
        h_ND = self.narrow(self.n2(x_ND), self.n2)
        y_ND = self.inner(self.p2, self.ffn(h_ND, index, attend))  # type: ignore[misc]
        return self.outer(self.p2, self.alpha * self.source(x_ND, h_ND) + self.beta * y_ND)

    def _parallel(self, x_ND: Tensor, index: int, angles: Angles, attend: Attend) -> Tensor:
        y_ND = self.mix(self.narrow(self.n1(x_ND), self.n1), index, angles, attend)
        y_ND = y_ND + self.ffn(self.narrow(self.n2(x_ND), self.n2), index, attend)  # type: ignore[misc]
        return self.alpha * x_ND + self.beta * y_ND

    def _shared(self, x_ND: Tensor, index: int, angles: Angles, attend: Attend) -> Tensor:
        h_ND = self.narrow(self.n1(x_ND), self.n1)
        y_ND = self.mix(h_ND, index, angles, attend) + self.ffn(h_ND, index, attend)  # type: ignore[misc]
        return self.alpha * x_ND + self.beta * y_ND

    def forward(self, x_ND: Tensor, index: int, angles: Angles, attend: Attend) -> Tensor:
        """`index` is the layer's number: an argument, so that equal layers share one compiled graph."""
        return self.run(x_ND, index, angles, attend)


def _first(x_ND: Tensor, h_ND: Tensor) -> Tensor:
    return x_ND


def _second(x_ND: Tensor, h_ND: Tensor) -> Tensor:
    return h_ND


def _apply(norm: nn.Module, y_ND: Tensor) -> Tensor:
    return norm(y_ND)


def _through(norm: nn.Module, y_ND: Tensor) -> Tensor:
    return y_ND


def _narrow(h_ND: Tensor, norm: nn.Module) -> Tensor:
    """A normalised fp32 stream in the type of the weights."""
    return h_ND.to(norm.weight.dtype)  # type: ignore[arg-type]


def _as_it_is(h_ND: Tensor, norm: nn.Module) -> Tensor:
    return h_ND


class Decoder(nn.Module):
    """A decoder-only model.

    Attributes:
        spec: what it is.
        family: name of the file in families/ whose layout it is saved in.
        config: the config.json it was loaded from ({} for a fresh model); unknown keys survive a save.
        bare: the file it came from lacked the family's optional prefix, and is written so again.
        spelling: other names than usual that its file had (model/rules.py), used again when it is written.
        kept: tensors of its file that it has no use for (heads for other tasks), written back as they are.
        checkpoint_every: 0 keeps all activations; k recomputes groups of k blocks in the backward pass.
    """

    def __init__(self, spec: Spec, family: str = "llama", config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.spec, self.family, self.config = spec, family, dict(config or {})
        self.bare = False
        self.spelling: tuple[str, ...] = ()
        self.kept: dict[str, Tensor] = {}
        self.checkpoint_every = 0
        self.ropes: list[Rope] = list(dict.fromkeys(a.rope for a in spec.attns if a.rope))
        self._inverse: dict[torch.device, list[tuple[Tensor, float]]] = {}
        narrow, padded = spec.embed_dim, spec.embed_pad
        self.embed = nn.Embedding(spec.vocab, spec.out_dim)
        self.pin = nn.Linear(narrow, spec.d, bias=False) if narrow and not padded else None
        self.pos = nn.Embedding(spec.max_pos + spec.pos_offset, spec.d) if spec.pos == "learned" else None
        self.seg = nn.Embedding(spec.type_vocab, spec.d) if spec.type_vocab else None
        self.embed_norm = make_norm(spec.out_dim if padded else spec.d, spec.embed_norm)
        self.blocks = nn.ModuleList(
            Block(spec.d, layer, i, self._rope_of(layer), spec.residual_fp32)
            for i, layer in enumerate(spec.layers)
        )
        self.norm = make_norm(spec.d, spec.final_norm)
        self.pout = _way_out(spec)
        own = not spec.tie and spec.head
        self.tied_bias = (
            nn.Parameter(torch.zeros(spec.vocab)) if spec.tie and spec.head and spec.head_bias else None
        )
        self.head = nn.Linear(spec.out_dim, spec.vocab, bias=spec.head_bias) if own else None

    def _rope_of(self, layer: Layer) -> int | None:
        return self.ropes.index(layer.attn.rope) if layer.attn and layer.attn.rope else None

    def angles(self, pos_N: Tensor, attend: Attend | None = None) -> Angles:
        """cos and sin of every distinct Rope. `attend` is read by Ropes that depend on the segments: their
        lengths or their prefixes. The frequencies are no buffers: `.to(bfloat16)` must not hit them."""
        if pos_N.device not in self._inverse:
            self._inverse[pos_N.device] = [
                (inv_F.to(pos_N.device), factor) for inv_F, factor in map(inverse_frequencies, self.ropes)
            ]
        result = []
        lengths = attend.lengths if attend is not None else (len(pos_N),)
        for rope, (inv_F, factor) in zip(self.ropes, self._inverse[pos_N.device], strict=True):
            place_NF = pos_N[:, None].float()
            if rope.switch is not None:
                inv_F, factor = by_length(rope, pos_N, lengths)
            elif rope.sections:
                place_NF = _streams(pos_N, lengths, attend, rope.sections)
            angle_NF = place_NF * inv_F
            grown = () if rope.log_from is None else (log_growth(pos_N, rope.log_from),)
            result.append((angle_NF.cos() * factor, angle_NF.sin() * factor, *grown))
        return result

    def forward(
        self,
        ids_N: Tensor | None,
        pos_N: Tensor,
        attend: Attend,
        inputs_embeds: Tensor | None = None,
        types_N: Tensor | None = None,
    ) -> Tensor:
        """Flat token ids (or [N, embedding width] inputs_embeds) and positions -> [N, spec.out_dim] hidden
        states after the final norm. `types_N` are token types, 0 when not given."""
        x_ND = self.embed(ids_N) if inputs_embeds is None else inputs_embeds
        x_ND = self._placed(x_ND, pos_N, types_N)
        angles = self.angles(pos_N, attend)
        every = self.checkpoint_every
        if every and torch.is_grad_enabled():
            for start in range(0, len(self.blocks), every):
                x_ND = checkpoint(self._group, start, every, x_ND, angles, attend, use_reentrant=False)
        else:
            x_ND = self._group(0, len(self.blocks), x_ND, angles, attend)
        x_ND = self.norm(x_ND)
        if self.spec.residual_fp32:
            x_ND = x_ND.to(self.embed.weight.dtype)
        return x_ND if self.pout is None else self.pout(x_ND)

    def _placed(self, x_ND: Tensor, pos_N: Tensor, types_N: Tensor | None) -> Tensor:
        """Embeddings on their way into the first block: scaled, widened, with positions and types, normed."""
        spec = self.spec
        if spec.embed_scale != 1.0:
            x_ND = x_ND * torch.tensor(spec.embed_scale, dtype=x_ND.dtype)
        if self.pin is not None:
            x_ND = self.pin(x_ND)
        if self.pos is not None:
            x_ND = x_ND + self.pos(pos_N + spec.pos_offset)
        elif spec.pos == "sinusoid":
            x_ND = x_ND + sinusoid(pos_N + spec.pos_offset, spec.d).to(x_ND.dtype)
        if self.seg is not None:
            x_ND = x_ND + self.seg(torch.zeros_like(pos_N) if types_N is None else types_N)
        x_ND = self.embed_norm(x_ND)
        if spec.embed_pad:
            x_ND = F.pad(x_ND, (0, spec.d - spec.out_dim))
        return x_ND.float() if spec.residual_fp32 else x_ND

    def _group(self, start: int, count: int, x_ND: Tensor, angles: Angles, attend: Attend) -> Tensor:
        for index, block in enumerate(self.blocks[start : start + count], start):
            x_ND = block(x_ND, index, angles, attend)
        return x_ND

    def head_weight(self) -> Tensor:
        """[V, out_dim] rows of the output head; the embedding itself when tied."""
        assert self.spec.head, "this model has no output head"
        weight_VD = self.embed.weight if self.head is None else self.head.weight
        return F.normalize(weight_VD, dim=-1) if self.spec.head_norm else weight_VD

    @property
    def head_bias(self) -> Tensor | None:
        """[V] bias of the output head, or None."""
        return self.tied_bias if self.head is None else self.head.bias

    @property
    def head_terms(self) -> dict[str, Any]:
        """What the loss and log-probs need beside the rows of the head: bias, scale and cap."""
        return {"bias_V": self.head_bias, "scale": self.spec.logit_scale, "softcap": self.spec.logit_softcap}

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., out_dim] hidden states -> [..., V] logits."""
        return self.shaped(F.linear(hidden, self.head_weight(), self.head_bias))

    def shaped(self, logits: Tensor) -> Tensor:
        """Scale and cap of logits, after the product with the head."""
        if self.spec.logit_scale != 1.0:
            logits = logits * self.spec.logit_scale
        cap = self.spec.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


class WayOut(nn.Module):
    """norm(act(x A + a)): from the stream to the width of the head."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        assert spec.head_act is not None
        self.dense = nn.Linear(spec.d, spec.out_dim)
        self.act = ACTIVATIONS[spec.head_act]
        self.norm = make_norm(spec.out_dim, spec.final_norm)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.norm(self.act(self.dense(x_ND)))


def _way_out(spec: Spec) -> nn.Module | None:
    if spec.head_act is not None:
        return WayOut(spec)
    return nn.Linear(spec.d, spec.embed_dim, bias=False) if spec.embed_dim else None


def prefix(spec: Spec, ids: Sequence[int]) -> int:
    """How many first tokens of a text are read in both directions: those before its first
    `spec.prefix_token` and `spec.prefix_more` from there on; none where it does not occur."""
    if spec.prefix_token is None or spec.prefix_token not in ids:
        return 0
    return min(len(ids), list(ids).index(spec.prefix_token) + spec.prefix_more)


def prefixes(
    spec: Spec, ids_N: Tensor, lengths: Sequence[int], weight_N: Tensor | None = None
) -> tuple[int, ...] | None:
    """`prefix` of each segment; None for models without such a token. What is to be predicted (the tokens
    behind the first weight) is no part of it, as when it is written: a prefix would show it."""
    if spec.prefix_token is None:
        return None
    rows = [row.tolist() for row in ids_N.split(list(lengths))]
    if weight_N is not None:
        for row, weights in zip(rows, weight_N.split(list(lengths)), strict=True):
            del row[1 + next((t for t, w in enumerate(weights.tolist()) if w), len(row)) :]
    return tuple(prefix(spec, row) for row in rows)


def _streams(pos_N: Tensor, lengths: Sequence[int], attend: Attend | None, sections: Sequence[int]) -> Tensor:
    """[N, F] position of every frequency, from [P, N] streams or from prefixes."""
    prefix = attend.prefix if attend is not None else None
    if pos_N.dim() == 1:
        assert prefix is not None and len(sections) == 2, "positions in two streams need a prefix"
        pos_N = two_streams(pos_N, lengths, prefix)
    return torch.repeat_interleave(
        pos_N.T.float(), torch.tensor(sections, device=pos_N.device), dim=1, output_size=sum(sections)
    )
