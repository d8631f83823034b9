"""Multi-head attention with shared key/value heads (Ainslie et al. 2023, arXiv:2305.13245).

N flat tokens, D width, H query heads, K key/value heads, E head width.

Order: one fused projection, `full` norm, clip, split into heads, norm per head, rotation, `attend`, output
projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from caravan.kernels.rope import rotate, split_rotate
from caravan.model.norms import make_norm
from caravan.model.positions import Angles
from caravan.model.spec import Attn, Layer

Heads = tuple[Tensor, Tensor, Tensor]
"""q [N, H, E], k [N, K, E], v [N, K, E]."""


class Attention(nn.Module):
    """Which of the optional steps there are is settled in __init__: forward has one path."""

    def __init__(self, d: int, attn: Attn, rope: int | None) -> None:
        super().__init__()
        self.attn, self.rope = attn, rope
        self.split = [attn.n_head, attn.n_kv, attn.n_kv]
        self.widths = [n * attn.head_dim for n in self.split]
        self.qkv = nn.Linear(d, sum(self.widths), bias=attn.qkv_bias)
        self.o = nn.Linear(attn.n_head * attn.head_dim, d, bias=attn.o_bias)
        self.qn = make_norm(_gain(attn, attn.n_head), attn.qk_norm) if attn.qk_norm else None
        self.kn = make_norm(_gain(attn, attn.n_kv), attn.qk_norm) if attn.qk_norm else None
        self.project = self._project(attn)
        self.turned = self._heads(attn)
        self.heads = self._grown if attn.rope and attn.rope.log_from else self.turned
        self.turn = self._turn_wide if attn.rope and attn.rope.fp32 else self._turn

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Rows of q, k and v."""
        return {"qkv.weight": tuple(self.widths)}

    def _project(self, attn: Attn) -> Any:
        if attn.qk_norm and attn.qk_norm_over == "full":
            return self._normed_whole if attn.clip_qkv is None else self._normed_whole_clipped
        return self._plain if attn.clip_qkv is None else self._clipped

    def _heads(self, attn: Attn) -> Any:
        if attn.qk_norm and attn.qk_norm_over != "full":
            return self._unrotated_normed if self.rope is None else self._rotated_normed
        if self.rope is None:
            return self._unrotated
        return self._rotated_wide if attn.rope and attn.rope.fp32 else self._rotated

    def _plain(self, x_ND: Tensor) -> Tensor:
        return self.qkv(x_ND)

    def _clipped(self, x_ND: Tensor) -> Tensor:
        assert self.attn.clip_qkv is not None
        return self.qkv(x_ND).clamp(-self.attn.clip_qkv, self.attn.clip_qkv)

    def _normed_whole(self, x_ND: Tensor) -> Tensor:
        q, k, v = self.qkv(x_ND).split(self.widths, -1)
        return torch.cat([self.qn(q), self.kn(k), v], -1)  # type: ignore[misc]

    def _normed_whole_clipped(self, x_ND: Tensor) -> Tensor:
        assert self.attn.clip_qkv is not None
        return self._normed_whole(x_ND).clamp(-self.attn.clip_qkv, self.attn.clip_qkv)

    def _rotated(self, qkv: Tensor, angles: Angles) -> Heads:
        cos_NF, sin_NF = angles[self.rope][:2]  # type: ignore[index]
        return split_rotate(qkv, cos_NF, sin_NF, self.attn.n_head, self.attn.n_kv)

    def _grown(self, qkv: Tensor, angles: Angles) -> Heads:
        q_NHE, k_NKE, v_NKE = self.turned(qkv, angles)
        return q_NHE * angles[self.rope][2].to(q_NHE.dtype), k_NKE, v_NKE  # type: ignore[index]

    def _rotated_wide(self, qkv: Tensor, angles: Angles) -> Heads:
        q_NHE, k_NKE, v_NKE = qkv.split(self.split, 1)
        return self.turn(q_NHE, angles), self.turn(k_NKE, angles), v_NKE

    def _unrotated(self, qkv: Tensor, angles: Angles) -> Heads:
        return qkv.split(self.split, 1)  # type: ignore[return-value]

    def _rotated_normed(self, qkv: Tensor, angles: Angles) -> Heads:
        q_NHE, k_NKE, v_NKE = self._unrotated_normed(qkv, angles)
        return self.turn(q_NHE, angles), self.turn(k_NKE, angles), v_NKE

    def _unrotated_normed(self, qkv: Tensor, angles: Angles) -> Heads:
        q_NHE, k_NKE, v_NKE = qkv.split(self.split, 1)
        return self.qn(q_NHE), self.kn(k_NKE), v_NKE  # type: ignore[misc]

    def _turn(self, x: Tensor, angles: Angles) -> Tensor:
        return rotate(x, *angles[self.rope][:2])  # type: ignore[index]

    def _turn_wide(self, x: Tensor, angles: Angles) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return rotate(wide, *angles[self.rope][:2]).to(x.dtype)  # type: ignore[index]

    def forward(self, x_ND: Tensor, index: int, angles: Angles, attend: Any) -> Tensor:
        qkv = self.project(x_ND).view(x_ND.shape[0], -1, self.attn.head_dim)
        return self.o(attend(index, *self.heads(qkv, angles), self.attn).flatten(1))


def _gain(attn: Attn, heads: int) -> int | tuple[int, int]:
    """Shape of the gain of queries or keys."""
    if attn.qk_norm_over == "full":
        return heads * attn.head_dim
    return (heads, attn.head_dim) if attn.qk_norm_over == "per_head" else attn.head_dim


def make(d: int, layer: Layer, index: int, rope: int | None) -> nn.Module:
    assert layer.attn is not None, "an attention layer needs its Attn"
    return Attention(d, layer.attn, rope)
