"""RWKV-6's time mixing (Peng et al. 2024, arXiv:2404.05892, section 4.2).

N flat tokens, S segments, D width, H heads, E head width, A = H E, R rank, L = 5 low-rank maps.

With delta = x' - x (x' the token before): a low-rank map of x + delta mix_x gives, for each of decay, key,
value, receptance and gate, how much of delta to add beyond its own `mix`; the decay is
exp(-exp(decay + lora(x_w))). State, output norm and gate are RWKV-5's.

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
from caravan.model.mixers.rwkv5 import HeadNorm, spread_decays
from caravan.model.positions import Angles
from caravan.model.spec import Layer


class TimeMix6(nn.Module):
    """Parameters `mix_x mix_w mix_k mix_v mix_r mix_g mix_w1 mix_w2 decay decay_w1 decay_w2 first`, matrices
    `k v r g o`, and `ln`. The low-rank maps are stored [in, out]."""

    FP32 = ("decay", "first")

    def __init__(self, d: int, ssm: knobs.Rwkv6) -> None:
        super().__init__()
        self.heads = (ssm.n_head, ssm.head_dim)
        inner = ssm.n_head * ssm.head_dim
        self.mix_x = nn.Parameter(torch.empty(d))
        self.mix_w, self.mix_k, self.mix_v, self.mix_r, self.mix_g = (
            nn.Parameter(torch.empty(d)) for _ in range(5)
        )
        self.mix_w1 = nn.Parameter(torch.empty(d, 5 * ssm.mix_rank))
        self.mix_w2 = nn.Parameter(torch.empty(5, ssm.mix_rank, d))
        self.decay = nn.Parameter(torch.empty(inner))
        self.decay_w1 = nn.Parameter(torch.empty(d, ssm.decay_rank))
        self.decay_w2 = nn.Parameter(torch.empty(ssm.decay_rank, inner))
        self.first = nn.Parameter(torch.empty(self.heads))
        self.k, self.v, self.r, self.g = (nn.Linear(d, inner, bias=False) for _ in range(4))
        self.o = nn.Linear(inner, d, bias=False)
        self.ln = HeadNorm(*self.heads, ssm.eps)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """As RWKV-5; the low-rank maps start at nothing (their second matrix small, their first zero)."""
        self.decay.copy_(spread_decays(self.decay))
        self.first.zero_()
        for mix in (self.mix_x, self.mix_w, self.mix_k, self.mix_v, self.mix_r, self.mix_g):
            mix.fill_(0.5)
        for w1, w2 in ((self.mix_w1, self.mix_w2), (self.decay_w1, self.decay_w2)):
            w1.zero_()
            w2.fill_(0.01)

    def forward(self, x_ND: Tensor, index: int, angles: Angles, attend: Any) -> Tensor:
        state = attend.state(index) or {}
        before_ND, shift = token_shift(attend.lengths, x_ND, state.get("shift"))
        delta_ND = before_ND - x_ND
        low_NLR = torch.tanh((x_ND + delta_ND * self.mix_x) @ self.mix_w1).unflatten(-1, (5, -1))
        more_LND = low_NLR.transpose(0, 1) @ self.mix_w2
        mixes = (self.mix_w, self.mix_k, self.mix_v, self.mix_r, self.mix_g)
        x_w, x_k, x_v, x_r, x_g = (
            x_ND + delta_ND * (mix + more) for mix, more in zip(mixes, more_LND.unbind(0), strict=True)
        )
        r, k, v = (t.unflatten(-1, self.heads) for t in (self.r(x_r), self.k(x_k), self.v(x_v)))
        decay = wide(self.decay) + wide(torch.tanh(x_w @ self.decay_w1) @ self.decay_w2)
        fade = -torch.exp(decay).unflatten(-1, self.heads)
        y_NHE, wkv = wkv6(attend.lengths, r, k, v, fade, wide(self.first), state.get("wkv"))
        attend.keep(index, {"shift": shift, "wkv": wkv})
        return self.o(self.ln(y_NHE) * F.silu(self.g(x_g)))


def make(d: int, layer: Layer, index: int, rope: int | None) -> nn.Module:
    return TimeMix6(d, layer.ssm)
