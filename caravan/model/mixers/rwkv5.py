"""RWKV-5's time mixing (Peng et al. 2024, arXiv:2404.05892, section 4.1).

N flat tokens, S segments, D width, H heads, E head width, A = H E.

With x' the token before x: k = K(x mix_k + x' (1 - mix_k)), v, r, g likewise; a matrix state per head fades
by exp(-exp(decay)) per key channel and gives the current token the bonus `first`; its output is normalised
per head and gated by silu(g). The released code divides by 8 before a norm with eps 1e-5: the same as eps
64e-5.

State: `shift` [S, D] the last token, `wkv` [S, H, E, E] (key, value) in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caravan.kernels.chunks import wide
from caravan.kernels.shortconv import token_shift
from caravan.kernels.wkv import wkv6
from caravan.model.mixers import knobs
from caravan.model.positions import Angles
from caravan.model.spec import Layer


class HeadNorm(nn.Module):
    """Layer norm within each head, in fp32, with a gain and an offset per channel."""

    def __init__(self, heads: int, width: int, eps: float) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.weight = nn.Parameter(torch.ones(heads * width))
        self.bias = nn.Parameter(torch.zeros(heads * width))

    def forward(self, y_NHE: Tensor) -> Tensor:
        """[N, H, E] -> [N, H * E] in the weights' type."""
        y_NA = wide(y_NHE).flatten(1)
        normed = F.group_norm(y_NA, self.heads, self.weight.to(y_NA), self.bias.to(y_NA), self.eps)
        return normed.to(self.weight.dtype)


class TimeMix5(nn.Module):
    """Parameters `decay first mix_k mix_v mix_r mix_g k v r g o ln`."""

    FP32 = ("decay", "first")

    def __init__(self, d: int, ssm: knobs.Rwkv5) -> None:
        super().__init__()
        self.heads = (ssm.n_head, ssm.head_dim)
        inner = ssm.n_head * ssm.head_dim
        self.decay, self.first = (nn.Parameter(torch.empty(self.heads)) for _ in range(2))
        self.mix_k, self.mix_v, self.mix_r, self.mix_g = (nn.Parameter(torch.empty(d)) for _ in range(4))
        self.k, self.v, self.r, self.g = (nn.Linear(d, inner, bias=False) for _ in range(4))
        self.o = nn.Linear(inner, d, bias=False)
        self.ln = HeadNorm(*self.heads, ssm.eps)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Decays from very slow to fast over the channels, half of each neighbour in the shift."""
        self.decay.copy_(spread_decays(self.decay))
        self.first.zero_()
        for mix in (self.mix_k, self.mix_v, self.mix_r, self.mix_g):
            mix.fill_(0.5)

    def forward(self, x_ND: Tensor, index: int, angles: Angles, attend: Any) -> Tensor:
        state = attend.state(index) or {}
        before_ND, shift = token_shift(attend.lengths, x_ND, state.get("shift"))
        r, k, v, g = (
            linear(x_ND * mix + before_ND * (1 - mix))
            for linear, mix in (
                (self.r, self.mix_r),
                (self.k, self.mix_k),
                (self.v, self.mix_v),
                (self.g, self.mix_g),
            )
        )
        r, k, v = (t.unflatten(-1, self.heads) for t in (r, k, v))
        fade = (-torch.exp(wide(self.decay))).expand(k.shape)
        y_NHE, wkv = wkv6(attend.lengths, r, k, v, fade, wide(self.first), state.get("wkv"))
        attend.keep(index, {"shift": shift, "wkv": wkv})
        return self.o(self.ln(y_NHE) * F.silu(g))


def spread_decays(like: Tensor) -> Tensor:
    """-6 ... -1 over all channels: the shape of `like`."""
    return torch.linspace(-6.0, -1.0, like.numel(), device=like.device).view_as(like)


def make(d: int, layer: Layer, index: int, rope: int | None) -> nn.Module:
    return TimeMix5(d, layer.ssm)
