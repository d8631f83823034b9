"""Multi-head latent attention (DeepSeek-V2, DeepSeek-AI 2024, arXiv:2405.04434, section 2.1).

N flat tokens, D width, H heads, P head width without position (nope), R rotary width, V value head width,
L width of a latent.

Keys and values of all heads are made from one latent per token, kva x; one rotary key serves every head. Over
whole texts the latent is expanded to full heads and `attend` sees ordinary attention with values of width V:
a head is [nope; rope], so its score is the sum of both parts.

In generation keys and values are kept, and the latent is what is kept: q' (K c) = (K' q)' c, so the keys' map
goes to the queries, the values' map behind the attention, and `attend` sees H query heads on one key head
[latent; rope] whose values are the latent. DeepSeek-V2 keeps 1,088 numbers per token and layer instead of
40,960, for dearer scores. Both ways are equal up to rounding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from caravan.kernels.rope import rotate
from caravan.model.norms import make_norm
from caravan.model.positions import Angles
from caravan.model.spec import Attn, Layer, Norm

LATENT_NORM = Norm(kind="rms", eps=1e-6)
"""Fixed in the released code, whatever the model's own eps is."""


class LatentAttention(nn.Module):
    """Parameters: `q` or `qa`, `qn`, `qb`; `kva` to [latent; rotary key], `kvn`, `kvb` to [nope; v] of every
    head; `o`. Biases (`qkv_bias`) sit on the projections into the latents."""

    def __init__(self, d: int, attn: Attn, rope: int) -> None:
        super().__init__()
        mla = attn.mla
        assert mla is not None and attn.rope is not None and attn.n_kv == attn.n_head, attn
        assert attn.head_dim == mla.nope + mla.rope and attn.rope.dim == mla.rope, attn
        self.attn, self.mla, self.rope = attn, mla, rope
        heads = attn.n_head
        if mla.q_rank is None:
            self.q = nn.Linear(d, heads * attn.head_dim, bias=False)
        else:
            self.qa = nn.Linear(d, mla.q_rank, bias=attn.qkv_bias)
            self.qn = make_norm(mla.q_rank, LATENT_NORM)
            self.qb = nn.Linear(mla.q_rank, heads * attn.head_dim, bias=False)
        self.kva = nn.Linear(d, mla.kv_rank + mla.rope, bias=attn.qkv_bias)
        self.kvn = make_norm(mla.kv_rank, LATENT_NORM)
        self.kvb = nn.Linear(mla.kv_rank, heads * (mla.nope + mla.v), bias=False)
        self.o = nn.Linear(heads * mla.v, d, bias=attn.o_bias)
        self.narrow = replace(
            attn, n_kv=1, head_dim=mla.kv_rank + mla.rope, scale=attn.scale, mla=None
        )  # as `attend` sees it over latents
        self.queries = self._direct if mla.q_rank is None else self._through_latent
        self.turn = self._turn_wide if attn.rope.fp32 else self._turn

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Rows of latent and rotary key; of key and value, in every head."""
        return {
            "kva.weight": (self.mla.kv_rank, self.mla.rope),
            "kvb.weight": (self.mla.nope, self.mla.v),
        }

    def _direct(self, x_ND: Tensor) -> Tensor:
        return self.q(x_ND)

    def _through_latent(self, x_ND: Tensor) -> Tensor:
        return self.qb(self.qn(self.qa(x_ND)))

    def _turn(self, x: Tensor, angles: Angles) -> Tensor:
        return rotate(x, *angles[self.rope])

    def _turn_wide(self, x: Tensor, angles: Angles) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return rotate(x.to(wide), *angles[self.rope]).to(x.dtype)

    def forward(self, x_ND: Tensor, index: int, angles: Angles, attend: Any) -> Tensor:
        mla, heads = self.mla, self.attn.n_head
        q_nope, q_rope = self.queries(x_ND).unflatten(1, (heads, -1)).split([mla.nope, mla.rope], -1)
        q_rope = self.turn(q_rope, angles)
        latent_NL, k_rope = self.kva(x_ND).split([mla.kv_rank, mla.rope], -1)
        latent_NL, k_rope = self.kvn(latent_NL), self.turn(k_rope.unsqueeze(1), angles)
        if not attend.whole:
            return self.o(self._over_latents(q_nope, q_rope, latent_NL.unsqueeze(1), k_rope, index, attend))
        k_nope, v_NHV = self.kvb(latent_NL).unflatten(1, (heads, -1)).split([mla.nope, mla.v], -1)
        q_NHE = torch.cat([q_nope, q_rope], -1)
        k_NHE = torch.cat([k_nope, k_rope.expand(-1, heads, -1)], -1)
        return self.o(attend(index, q_NHE, k_NHE, v_NHV, self.attn).flatten(1))

    def _over_latents(
        self, q_NHP: Tensor, q_NHR: Tensor, latent_N1L: Tensor, k_N1R: Tensor, index: int, attend: Any
    ) -> Tensor:
        """-> [N, H * V]"""
        both_HxL = self.kvb.weight.to(q_NHP.dtype).unflatten(0, (self.attn.n_head, -1))
        keys_HPL, values_HVL = both_HxL.split([self.mla.nope, self.mla.v], 1)
        q_NHL = torch.einsum("nhp,hpl->nhl", q_NHP, keys_HPL)
        q, k = torch.cat([q_NHL, q_NHR], -1), torch.cat([latent_N1L, k_N1R], -1)
        seen_NHL = attend(index, q, k, latent_N1L, self.narrow)
        return torch.einsum("nhl,hvl->nhv", seen_NHL, values_HVL).flatten(1)


def make(d: int, layer: Layer, index: int, rope: int | None) -> nn.Module:
    assert layer.attn is not None and rope is not None, "latent attention needs its Attn and a Rope"
    return LatentAttention(d, layer.attn, rope)
