"""What a decoder is, as frozen values: the knobs that tell one model family from another.

A Spec says everything that changes the numbers and nothing about files, machines or training. `decoder.py`
builds a module from it, `families/` translate a Hugging Face config.json to it and back, `sizes.py` makes
fresh ones. A knob is here when some released family needs it and the decoder honours it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_new", "relu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """RMS or layer normalisation over the width."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    """Added to the mean square (rms) or the variance (layer)."""
    bias: bool = False
    """A learned offset after the gain (layer only)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """A stretched rotary embedding, for contexts longer than the one trained first."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float = 1.0
    """By how much the context grows."""
    original_context: int = 0
    """Positions seen before the stretch (llama3, yarn)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_context / this are stretched fully."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_context / this are left alone."""
    beta_fast: float = 32.0
    """yarn: turns within the original context above which a frequency is left alone."""
    beta_slow: float = 1.0
    """yarn: turns below which a frequency is stretched fully."""
    attention_factor: float | None = None
    """yarn: factor on cos and sin; None means 0.1 ln(factor) + 1."""
    truncate: bool = True
    """yarn: round the ramp's ends outward to whole dimensions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding in the rotate-half layout (Su et al. 2021, arXiv:2104.09864)."""

    dim: int
    """Rotary dimensions at the head of each head; the rest pass unchanged."""
    theta: float = 10_000.0
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attn:
    """Self-attention: causal, H query heads on K key/value heads of width E."""

    n_head: int
    n_kv: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    scale: float = 0.0
    """Final multiplier of q.k; 0 means head_dim ** -0.5."""
    rope: Rope | None = None
    """None: positions come from elsewhere (learned) or not at all."""
    window: int | None = None
    """Key j is visible to query i iff i - j < window. Kept for export; `Spec.context` never exceeds it."""
    qk_norm: Norm | None = None
    """Normalise each query and key head before the rotation, one gain of width E for all heads."""

    def __post_init__(self) -> None:
        if self.scale == 0.0:
            object.__setattr__(self, "scale", self.head_dim**-0.5)
        assert self.n_head % self.n_kv == 0, (self.n_head, self.n_kv)


@dataclass(frozen=True, slots=True, kw_only=True)
class FFN:
    """The position-wise part of a layer: `mlp` act(xA)B, or `glu` (act(xG) * xU)B."""

    kind: Literal["mlp", "glu"]
    d_ff: int
    act: Activation
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One pre-norm layer: x + attn(norm(x)), then x + ffn(norm(x))."""

    attn: Attn
    ffn: FFN
    norm: Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A whole decoder."""

    vocab: int
    """Rows of the embedding; may exceed the number of ids the tokenizer knows."""
    d: int
    """Width of the residual stream."""
    layers: tuple[Layer, ...]
    final_norm: Norm
    max_pos: int
    """Positions the model was made for."""
    pos: Literal["none", "learned"] = "none"
    """learned: a table of max_pos rows is added to the embedding."""
    embed_scale: float = 1.0
    tie: bool = True
    """The output head is the embedding."""
    head: bool = True
    """False: there is no output head at all (reward models)."""
    head_bias: bool = False
    logit_scale: float = 1.0

    @property
    def context(self) -> int:
        """Longest sequence for which full causal attention is what the model was trained with."""
        return min([self.max_pos, *(layer.attn.window for layer in self.layers if layer.attn.window)])

    @property
    def parameters(self) -> int:
        """Number of weights, tied head counted once."""
        norm = {"rms": 1, "layer": 1}
        total = self.vocab * self.d + (self.max_pos * self.d if self.pos == "learned" else 0)
        if self.head:
            total += (0 if self.tie else self.vocab * self.d) + (self.vocab if self.head_bias else 0)
        total += self.d * (norm[self.final_norm.kind] + self.final_norm.bias)
        for layer in self.layers:
            a, f = layer.attn, layer.ffn
            qkv = (a.n_head + 2 * a.n_kv) * a.head_dim
            total += self.d * qkv + qkv * a.qkv_bias + a.n_head * a.head_dim * self.d + self.d * a.o_bias
            total += 2 * a.head_dim * (1 + a.qk_norm.bias) if a.qk_norm else 0
            inner = f.d_ff * (2 if f.kind == "glu" else 1)
            total += self.d * inner + inner * f.bias + f.d_ff * self.d + self.d * f.bias
            total += 2 * self.d * (1 + layer.norm.bias)
        return total
