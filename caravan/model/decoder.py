"""The one decoder: every family is this module with another Spec.

N flat tokens, D width, V vocabulary, H query heads, K key/value heads, E head width, F rotary frequencies.

`forward` takes flat tokens with explicit positions and returns hidden states; it knows nothing of masks,
caches, padding or losses. What a token may see is the business of `attend`, a callable built once per batch:
`attend(layer, q_NHE, k_NKE, v_NKE, scale) -> o_NHE` (training: kernels.attention.Segments; generation: the
engine's paged cache). Choices between knobs are made in `__init__`, so that every forward of a model takes
the same path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from caravan.kernels.glu import swiglu
from caravan.kernels.norm import rms_norm
from caravan.kernels.rope import rotate, split_rotate
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, Spec


class Attend(Protocol):
    """What a token sees: causal training segments, a paged cache, ..."""

    def __call__(
        self, layer: int, q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, scale: float, /
    ) -> Tensor: ...


Angles = list[tuple[Tensor, Tensor]]
"""cos and sin, each [N, F] in fp32, of every distinct Rope of the model."""


def inverse_frequencies(rope: Rope) -> tuple[Tensor, float]:
    """[F] angles per position in fp32, and the factor on cos and sin.

    linear: Chen et al. 2023 (arXiv:2306.15595); llama3: Llama 3 release; yarn: Peng et al. 2023
    (arXiv:2309.00071).
    """
    exponent_F = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    inv_F = 1.0 / (rope.theta**exponent_F)
    scaling = rope.scaling
    if scaling is None:
        return inv_F, 1.0
    if scaling.kind == "linear":
        return inv_F / scaling.factor, 1.0
    if scaling.kind == "llama3":
        turns_F = scaling.original_context * inv_F / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep_F = ((turns_F - low) / (high - low)).clamp(0, 1)
        return inv_F * (keep_F + (1 - keep_F) / scaling.factor), 1.0

    def dimension(turns: float) -> float:
        return (
            rope.dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        )

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp_F = (torch.arange(rope.dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    stretch_F = ramp_F.clamp(0, 1)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return inv_F * (1 - stretch_F) + inv_F / scaling.factor * stretch_F, factor


class RMSNorm(nn.Module):
    def __init__(self, d: int, norm: Norm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x_ND: Tensor) -> Tensor:
        return rms_norm(x_ND, self.weight, self.eps)


def make_norm(d: int, norm: Norm) -> nn.Module:
    """The module of a Norm of width d."""
    return RMSNorm(d, norm) if norm.kind == "rms" else nn.LayerNorm(d, eps=norm.eps, bias=norm.bias)


def _gelu_new(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_new": _gelu_new, "relu": F.relu,
}  # fmt: skip


class Attention(nn.Module):
    """One fused projection, optional norm of queries and keys, rotation, `attend`, output projection."""

    def __init__(self, d: int, attn: Attn, rope: int | None) -> None:
        super().__init__()
        self.attn, self.rope = attn, rope
        self.split = [attn.n_head, attn.n_kv, attn.n_kv]
        self.qkv = nn.Linear(d, sum(self.split) * attn.head_dim, bias=attn.qkv_bias)
        self.o = nn.Linear(attn.n_head * attn.head_dim, d, bias=attn.o_bias)
        self.qn = make_norm(attn.head_dim, attn.qk_norm) if attn.qk_norm else None
        self.kn = make_norm(attn.head_dim, attn.qk_norm) if attn.qk_norm else None
        plain = self._rotated if attn.qk_norm is None else self._normed
        self.heads = plain if rope is not None else self._unrotated

    def _rotated(self, qkv: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        return split_rotate(qkv, *angles[self.rope], self.attn.n_head, self.attn.n_kv)  # type: ignore[index]

    def _unrotated(self, qkv: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        return qkv.split(self.split, 1)  # type: ignore[return-value]

    def _normed(self, qkv: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        q_NHE, k_NKE, v_NKE = qkv.split(self.split, 1)
        cos, sin = angles[self.rope]  # type: ignore[index]
        return rotate(self.qn(q_NHE), cos, sin), rotate(self.kn(k_NKE), cos, sin), v_NKE  # type: ignore[misc]

    def forward(self, x_ND: Tensor, layer: int, angles: Angles, attend: Attend) -> Tensor:
        qkv = self.qkv(x_ND).view(x_ND.shape[0], -1, self.attn.head_dim)
        return self.o(attend(layer, *self.heads(qkv, angles), self.attn.scale).flatten(1))


class MLP(nn.Module):
    """act(x A) B."""

    def __init__(self, d: int, ffn: FFN) -> None:
        super().__init__()
        self.inp = nn.Linear(d, ffn.d_ff, bias=ffn.bias)
        self.out = nn.Linear(ffn.d_ff, d, bias=ffn.bias)
        self.act = ACTIVATIONS[ffn.act]

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.out(self.act(self.inp(x_ND)))


class GLU(nn.Module):
    """(act(x G) * x U) B with [G; U] fused (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, d: int, ffn: FFN) -> None:
        super().__init__()
        self.inp = nn.Linear(d, 2 * ffn.d_ff, bias=ffn.bias)
        self.out = nn.Linear(ffn.d_ff, d, bias=ffn.bias)
        self.act = ACTIVATIONS[ffn.act]
        self.inner = swiglu if ffn.act == "silu" else self._inner

    def _inner(self, inner: Tensor) -> Tensor:
        gate, up = inner.chunk(2, -1)
        return self.act(gate) * up

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.out(self.inner(self.inp(x_ND)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, d: int, layer: Layer, index: int, rope: int | None) -> None:
        super().__init__()
        self.index = index
        self.n1, self.n2 = make_norm(d, layer.norm), make_norm(d, layer.norm)
        self.mix = Attention(d, layer.attn, rope)
        self.ffn = GLU(d, layer.ffn) if layer.ffn.kind == "glu" else MLP(d, layer.ffn)

    def forward(self, x_ND: Tensor, angles: Angles, attend: Attend) -> Tensor:
        x_ND = x_ND + self.mix(self.n1(x_ND), self.index, angles, attend)
        return x_ND + self.ffn(self.n2(x_ND))


class Decoder(nn.Module):
    """A decoder-only transformer.

    Attributes:
        spec: what it is.
        family: name of the file in families/ whose layout it is saved in.
        config: the config.json it was loaded from ({} for a fresh model); unknown keys survive a save.
        bare: the file it came from lacked the family's optional prefix, and is written so again.
        checkpoint_every: 0 keeps all activations; k recomputes groups of k blocks in the backward pass.
    """

    def __init__(self, spec: Spec, family: str = "llama", config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.spec, self.family, self.config = spec, family, dict(config or {})
        self.bare = False
        self.checkpoint_every = 0
        self.ropes = list(dict.fromkeys(layer.attn.rope for layer in spec.layers if layer.attn.rope))
        self._inverse: dict[torch.device, list[tuple[Tensor, float]]] = {}
        self.embed = nn.Embedding(spec.vocab, spec.d)
        self.pos = nn.Embedding(spec.max_pos, spec.d) if spec.pos == "learned" else None
        self.blocks = nn.ModuleList(
            Block(spec.d, layer, i, self.ropes.index(layer.attn.rope) if layer.attn.rope else None)
            for i, layer in enumerate(spec.layers)
        )
        self.norm = make_norm(spec.d, spec.final_norm)
        self.head = None if spec.tie or not spec.head else nn.Linear(spec.d, spec.vocab, bias=spec.head_bias)

    def angles(self, pos_N: Tensor) -> Angles:
        """cos and sin of every distinct Rope. The frequencies are no buffers: `.to(bfloat16)` must not hit
        them."""
        if pos_N.device not in self._inverse:
            self._inverse[pos_N.device] = [
                (inv_F.to(pos_N.device), factor) for inv_F, factor in map(inverse_frequencies, self.ropes)
            ]
        result = []
        for inv_F, factor in self._inverse[pos_N.device]:
            angle_NF = pos_N[:, None].float() * inv_F
            result.append((angle_NF.cos() * factor, angle_NF.sin() * factor))
        return result

    def forward(
        self, ids_N: Tensor | None, pos_N: Tensor, attend: Attend, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Flat token ids (or [N, D] inputs_embeds) and positions -> [N, D] hidden states after the final
        norm."""
        x_ND = self.embed(ids_N) if inputs_embeds is None else inputs_embeds
        if self.spec.embed_scale != 1.0:
            x_ND = x_ND * torch.tensor(self.spec.embed_scale, dtype=x_ND.dtype)
        if self.pos is not None:
            x_ND = x_ND + self.pos(pos_N)
        angles = self.angles(pos_N)
        every = self.checkpoint_every
        if every and torch.is_grad_enabled():
            for start in range(0, len(self.blocks), every):
                x_ND = checkpoint(self._group, start, every, x_ND, angles, attend, use_reentrant=False)
        else:
            x_ND = self._group(0, len(self.blocks), x_ND, angles, attend)
        return self.norm(x_ND)

    def _group(self, start: int, count: int, x_ND: Tensor, angles: Angles, attend: Attend) -> Tensor:
        for block in self.blocks[start : start + count]:
            x_ND = block(x_ND, angles, attend)
        return x_ND

    def head_weight(self) -> Tensor:
        """[V, D] rows of the output head; the embedding itself when tied."""
        assert self.spec.head, "this model has no output head"
        return self.embed.weight if self.head is None else self.head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """[V] bias of the output head, or None."""
        return None if self.head is None else self.head.bias

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] hidden states -> [..., V] logits."""
        logits = F.linear(hidden, self.head_weight(), self.head_bias)
        return logits if self.spec.logit_scale == 1.0 else logits * self.spec.logit_scale
