"""What a decoder is, as frozen values: the knobs that tell one model family from another.

A Spec says everything that changes the numbers and nothing about files, machines or training. `decoder.py`
builds a module from it, `families/` translate a Hugging Face config.json to it and back, `sizes.py` makes
fresh ones. A knob is here when some released family needs it and the decoder honours it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

Activation = Literal["silu", "gelu", "gelu_new", "quick_gelu", "relu", "relu2", "tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """RMS or layer normalisation over the width."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    """Added to the mean square (rms) or the variance (layer)."""
    bias: bool = False
    """A learned offset after the gain."""
    affine: bool = True
    """False: no gain and no offset."""
    unit_offset: bool = False
    """The gain is 1 + weight."""
    gain_fp32: bool = False
    """Multiply in fp32, then cast; otherwise cast, then multiply. Equal in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """A stretched rotary embedding, for contexts longer than the one trained first."""

    kind: Literal["linear", "dynamic", "powers", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    """By how much the context grows."""
    original_context: int = 0
    """Positions seen before the stretch (not read by linear)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_context / this are stretched fully."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_context / this are left alone."""
    beta_fast: float = 32.0
    """yarn: turns within the original context above which a frequency is left alone."""
    beta_slow: float = 1.0
    """yarn: turns below which a frequency is stretched fully."""
    attention_factor: float | None = None
    """yarn, longrope: factor on cos and sin; None means the formula of the kind."""
    mscale: float | None = None
    """yarn: with `mscale_all_dim`, the factor on cos and sin is m(mscale) / m(mscale_all_dim), where
    m(x) = 0.1 x ln(factor) + 1."""
    mscale_all_dim: float | None = None
    truncate: bool = True
    """yarn: round the ramp's ends outward to whole dimensions."""
    short_factor: tuple[float, ...] = ()
    """longrope: divisor of every frequency in sequences up to `original_context`."""
    long_factor: tuple[float, ...] = ()
    """longrope: divisor of every frequency in longer ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), always computed in the rotate-half
    layout."""

    dim: int
    """Rotary dimensions at the head of each head; the rest pass unchanged."""
    theta: float = 10_000.0
    scaling: RopeScaling | None = None
    interleaved: bool = False
    """In the checkpoint pairs lie side by side; rows are reordered on load and back on export."""
    fp32: bool = False
    """Rotate in fp32 and cast the result; otherwise cos and sin are cast first. Equal in fp32."""
    sections: tuple[int, ...] = ()
    """Frequencies turned by each stream of positions, in sum dim / 2; empty: one stream for all. With two
    streams the first is min(position, prefix - 1), the second max(position - prefix + 1, 0)."""
    fp16_frequencies: bool = False
    """Angles per position were rounded to fp16 when the model was trained."""
    log_from: int | None = None
    """The query at position p >= this is multiplied by ln(p + 1) / ln(this), as attention spreads over more
    keys (Su 2021, kexue.fm/archives/8823)."""

    @property
    def switch(self) -> int | None:
        """Length beyond which the frequencies depend on the sequence's own length, or None."""
        by_length = self.scaling is not None and self.scaling.kind in ("dynamic", "powers", "longrope")
        return self.scaling.original_context if by_length and self.scaling else None


@dataclass(frozen=True, slots=True, kw_only=True)
class MLA:
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434): widths of its projections."""

    q_rank: int | None
    """Width of the queries' latent; None: queries are projected directly."""
    kv_rank: int
    """Width of the latent that keys and values are made from."""
    nope: int
    """Width per head of the part of queries and keys without position."""
    rope: int
    """Width of the rotary part: per head in queries, one for all heads in keys."""
    v: int
    """Width of a value head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attn:
    """Self-attention: H query heads on K key/value heads of width E."""

    n_head: int
    n_kv: int
    head_dim: int
    """Width of a query or key head (MLA: nope + rope)."""
    qkv_bias: bool = False
    o_bias: bool = False
    scale: float = 0.0
    """Final multiplier of q.k; 0 means head_dim ** -0.5."""
    rope: Rope | None = None
    """None: positions come from elsewhere (learned, ALiBi) or not at all."""
    alibi: bool = False
    """Add slope * (j - i) * alibi_scale to the score of query i and key j (Press et al. 2021)."""
    alibi_scale: float = 1.0
    alibi_max: float = 8.0
    """The smallest slope of a power-of-two number of heads is 2 ** -alibi_max."""
    window: int | None = None
    """Key j is visible to query i iff i - j < window."""
    causal: bool = True
    clip_qkv: float | None = None
    """Clamp projected q, k, v to [-this, this], after a `full` norm and before everything else."""
    softcap: float | None = None
    """Scores s become c tanh(s / c) before the mask."""
    qk_norm: Norm | None = None
    """Normalise queries and keys before the rotation."""
    qk_norm_over: Literal["head", "per_head", "full"] = "head"
    """head: every head by one gain [E]; per_head: by its own gain, [H, E]; full: the projection as one."""
    mla: MLA | None = None

    def __post_init__(self) -> None:
        if self.scale == 0.0:
            object.__setattr__(self, "scale", self.head_dim**-0.5)
        assert self.n_head % self.n_kv == 0, (self.n_head, self.n_kv)

    @property
    def value_dim(self) -> int:
        """Width of a value head."""
        return self.mla.v if self.mla else self.head_dim

    @property
    def kept(self) -> int:
        """Numbers that generation keeps per token: keys and values of all heads, or the latent they are made
        from with its rotary part (as keys, and once more as values)."""
        if self.mla:
            return 2 * self.mla.kv_rank + self.mla.rope
        return self.n_kv * (self.head_dim + self.value_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """A mixture of gated experts (Shazeer et al. 2017): how tokens choose among them."""

    n_expert: int
    top_k: int
    d_ff: int
    """Inner width of one expert."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    renorm: bool = True
    """Divide the weights of the chosen by (their sum + eps)."""
    eps: float = 0.0
    scale: float = 1.0
    """Factor on the weights of the chosen."""
    n_group: int = 1
    """Experts are divided into groups, of which the best `topk_group` may be chosen from."""
    topk_group: int = 1
    group_score: Literal["max", "top2"] = "max"
    """A group's score: its best expert, or the sum of its best two."""
    bias_correction: bool = False
    """A learned bias per expert, added for the choice only."""
    shared_ff: int = 0
    """Inner width of a dense expert that every token passes; 0: none."""
    shared_gate: bool = False
    """The dense expert is weighed by a sigmoid gate."""
    fp32_router: bool = True
    aux_coef: float = 0.001
    """Weight of the load-balancing loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FFN:
    """The position-wise part of a layer: `mlp` act(xA)B, `glu` (act(xG) * xU)B, `moe` a mixture of glus,
    `rwkv` channel mixing."""

    kind: str
    """A file of model/ffn."""
    d_ff: int
    act: Activation
    bias: bool = False
    moe: MoE | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer: a mixer (attention or a recurrence) and an FFN, with their norms and residuals.

    A sublayer f turns x into alpha * (h if res_from_norm else x) + beta * y, where h = norm(x) if `pre` else
    x, and y = f(h), normalised if post is "out"; with post "sum" the result is normalised. A parallel layer
    is alpha * x + beta * (mixer(n1 x) + ffn(n2 x)), where n2 is n1 if `shared_norm`.
    """

    mixer: str = "attn"
    """A file of model/mixers."""
    attn: Attn | None = None
    ssm: Any = None
    """Knobs of a recurrent mixer: a frozen dataclass of its file."""
    ffn: FFN | None = None
    """None: the layer is its mixer."""
    norm: Norm
    pre: bool = True
    post: Literal["none", "out", "sum"] = "none"
    pre_mixer: bool = True
    """False: no norm before the mixer although `pre` (the first layer of YaLM)."""
    parallel: bool = False
    shared_norm: bool = False
    res_from_norm: bool = False
    alpha: float = 1.0
    beta: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A whole decoder."""

    vocab: int
    """Rows of the embedding; may exceed the number of ids the tokenizer knows."""
    d: int
    """Width of the residual stream."""
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    max_pos: int
    """Positions the model was made for."""
    pos: Literal["none", "learned", "sinusoid"] = "none"
    """learned: a table of max_pos + pos_offset rows is added to the embedding; sinusoid: fixed numbers."""
    pos_offset: int = 0
    """The first token has this position in the table."""
    embed_dim: int | None = None
    """Width of the embedding if not d: a matrix leads in, another out to the head."""
    embed_pad: bool = False
    """No matrix leads in: the narrow embedding is normalised and filled up with zeros."""
    head_act: Activation | None = None
    """The way out to the head is a matrix with bias, this activation, and the final norm once more."""
    embed_scale: float = 1.0
    embed_norm: Norm | None = None
    """Normalise the embedding, after positions."""
    type_vocab: int = 0
    """Rows of the token-type embedding; 0: none."""
    tie: bool = True
    """The output head is the embedding."""
    head: bool = True
    """False: there is no output head at all (reward models)."""
    head_bias: bool = False
    """Also of a tied head, where it is a parameter of its own."""
    head_norm: bool = False
    """Rows of the head are divided by their length."""
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    """Logits z become c tanh(z / c), after the scale."""
    residual_fp32: bool = False
    """The residual stream is kept in fp32 whatever the weights are."""
    prefix_token: int | None = None
    """Tokens before the first one of this id see each other in both directions; below 0: no token does."""
    prefix_more: int = 0
    """So many tokens from that one on belong to them."""

    @property
    def out_dim(self) -> int:
        """Width of what the decoder returns and heads read."""
        return self.embed_dim or self.d

    @property
    def lead(self) -> tuple[int, ...]:
        """Ids that the model itself puts in front of every text; none but for CPM-Ant."""
        return ()

    @property
    def attns(self) -> list[Attn]:
        """The attention of every layer that has one."""
        return [layer.attn for layer in self.layers if layer.attn]

    @property
    def cached(self) -> list[Attn]:
        """The layers that keep keys and values in generation, one position for every `patch_size` tokens."""
        return self.attns

    @property
    def patch_size(self) -> int:
        """Tokens read at once; more than 1 for bGPT alone."""
        return 1

    @property
    def context(self) -> int:
        """Longest sequence the model was made for."""
        return self.max_pos

    @property
    def parameters(self) -> int:
        """Number of trained weights, tied head counted once."""
        return _parameters(self)


@functools.lru_cache(maxsize=64)
def _parameters(spec: Spec) -> int:
    from caravan.model.blank import blank  # a Spec itself needs no torch
    from caravan.model.decoder import Decoder

    with blank():
        return sum(p.numel() for p in Decoder(spec).parameters() if p.requires_grad)
