"""Knobs of the recurrent mixers: what a Layer's `ssm` holds. One frozen dataclass per mixer."""

from __future__ import annotations

from dataclasses import dataclass

from caravan.model.spec import Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba:
    """A selective state space with a decay per channel and state."""

    d_inner: int
    """Channels of the state space."""
    d_state: int
    """States per channel."""
    d_conv: int = 4
    """Taps of the convolution before it."""
    dt_rank: int
    """Width of the bottleneck that time steps are made from."""
    bias: bool = False
    """Biases on the projections in and out."""
    conv_bias: bool = True
    dt_norm: Norm | None = None
    """Normalise the bottleneck, B and C (Jamba: with gains; Falcon-Mamba: without)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2:
    """A selective state space with one decay per head."""

    n_head: int
    head_dim: int
    d_state: int
    n_group: int = 1
    """Groups of heads that share B and C, and that the gated norm is taken over."""
    d_conv: int = 4
    bias: bool = False
    conv_bias: bool = True
    eps: float = 1e-5
    """Of the gated norm."""
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    """Bounds of a time step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rwkv4:
    """An exponentially fading average of values."""

    d_att: int
    """Channels of the average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rwkv5:
    """A matrix state per head with a learned, fixed decay per channel."""

    n_head: int
    head_dim: int
    eps: float = 64e-5
    """Of the group norm behind the state."""
    native: bool = True
    """In the checkpoint tensors have their author's names; otherwise those of the port to transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rwkv6:
    """A matrix state per head whose decay and token shift depend on the token."""

    n_head: int
    head_dim: int
    mix_rank: int = 32
    """Width of the low-rank map of each of the five token shifts."""
    decay_rank: int = 64
    """Width of the low-rank map of the decay."""
    eps: float = 64e-5
    native: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Rwkv7:
    """A matrix state per head that is corrected by the delta rule."""

    n_head: int
    head_dim: int
    decay_rank: int
    rate_rank: int
    """Width of the low-rank map of the in-context learning rate."""
    value_rank: int
    """Width of the low-rank map that mixes the first layer's values in (not in the first layer)."""
    gate_rank: int
    eps: float = 64e-5
    native: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyena:
    """A gated long convolution in modal form."""

    n_head: int
    """Groups of columns that are split into the two gates and the input."""
    d_state: int
    """Modes per channel."""
    d_conv: int = 3
    """Taps of the short filter."""
    conv_bias: bool = True
    column_split: bool = True
    """Gates and input lie together per head, not apart."""
