"""RWKV-7's time mixing (Peng et al. 2025, arXiv:2503.14456, section 4.1).

N flat tokens, S segments, D width, H heads, E head width, A = H E.

With delta = x' - x (x' the token before) and x_c = x + delta mix_c for c in r, w, k, v, a, g:
    fade = -e^-0.5 sigmoid(w0 + tanh(x_w w1) w2)        the log-decay
    a = sigmoid(a0 + x_a a1 a2)                         the in-context learning rate
    v = v + (v_first - v) sigmoid(v0 + x_v v1 v2)       after the first layer: its values, mixed in
    kk = k k_k, of length 1 in each head;  k = k (1 + (a - 1) k_a)
    S_t = S_{t-1} (diag(e^fade) - kk (kk a)') + v k',   y = norm(S r) + (r . k r_k) v,   out = o(y g)
with g = sigmoid(x_g g1) g2.

State: `shift` [S, D] the last token, `wkv` [S, H, E, E] (value, key) in fp32. The first layer's values are
handed to the later ones as an attribute of `attend`, the one object that all layers of a pass share.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caravan.kernels.chunks import wide
from caravan.kernels.shortconv import token_shift
from caravan.kernels.wkv import wkv7
from caravan.model.mixers import knobs
from caravan.model.mixers.rwkv5 import HeadNorm
from caravan.model.positions import Angles
from caravan.model.spec import Layer

FASTEST = -math.exp(-0.5)
"""Log-decay per token that no channel exceeds."""


class TimeMix7(nn.Module):
    """Parameters `mix_r mix_w mix_k mix_v mix_a mix_g`, `w0 w1 w2 a0 a1 a2 g1 g2 k_k k_a r_k`, after the
    first layer `v0 v1 v2`, matrices `r k v o`, and `ln`. The low-rank maps are stored [in, out]."""

    FP32 = ("w0",)

    def __init__(self, d: int, ssm: knobs.Rwkv7, first: bool) -> None:
        super().__init__()
        self.heads = (ssm.n_head, ssm.head_dim)
        inner = ssm.n_head * ssm.head_dim
        self.mix_r, self.mix_w, self.mix_k, self.mix_v, self.mix_a, self.mix_g = (
            nn.Parameter(torch.empty(d)) for _ in range(6)
        )
        self.w0, self.a0, self.k_k, self.k_a = (nn.Parameter(torch.empty(inner)) for _ in range(4))
        self.w1, self.w2 = _low_rank(d, ssm.decay_rank, inner)
        self.a1, self.a2 = _low_rank(d, ssm.rate_rank, inner)
        self.g1, self.g2 = _low_rank(d, ssm.gate_rank, inner)
        if not first:
            self.v0 = nn.Parameter(torch.empty(inner))
            self.v1, self.v2 = _low_rank(d, ssm.value_rank, inner)
        self.r_k = nn.Parameter(torch.empty(self.heads))
        self.r, self.k, self.v = (nn.Linear(d, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, d, bias=False)
        self.ln = HeadNorm(*self.heads, ssm.eps)
        self.values = self._give if first else self._take
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Half of each neighbour in the shift, decays from slow to fast, low-rank maps that start at nothing
        (except the gate's, which has no bias to start from)."""
        for name, p in self.named_parameters(recurse=False):
            if name.startswith("mix_"):
                p.fill_(0.5)
            elif name in ("w1", "a1", "v1", "a0", "r_k"):
                p.zero_()
            elif name.endswith(("1", "2")):
                p.copy_(torch.linspace(-0.05, 0.05, p.numel(), device=p.device).view_as(p))
            else:
                p.fill_(1.0)
        self.w0.copy_(torch.linspace(-5.5, 0.5, len(self.w0), device=self.w0.device))

    def _give(self, v_NA: Tensor, x_v: Tensor, attend: Any) -> Tensor:
        attend.first_values = v_NA
        return v_NA

    def _take(self, v_NA: Tensor, x_v: Tensor, attend: Any) -> Tensor:
        return torch.lerp(v_NA, attend.first_values, torch.sigmoid(self.v0 + x_v @ self.v1 @ self.v2))

    def forward(self, x_ND: Tensor, index: int, angles: Angles, attend: Any) -> Tensor:
        state = attend.state(index) or {}
        before_ND, shift = token_shift(attend.lengths, x_ND, state.get("shift"))
        delta_ND = before_ND - x_ND
        mixes = (self.mix_r, self.mix_w, self.mix_k, self.mix_v, self.mix_a, self.mix_g)
        x_r, x_w, x_k, x_v, x_a, x_g = (x_ND + delta_ND * mix for mix in mixes)
        fade = FASTEST * torch.sigmoid(wide(self.w0) + wide(torch.tanh(x_w @ self.w1) @ self.w2))
        rate = torch.sigmoid(self.a0 + x_a @ self.a1 @ self.a2)
        gate = torch.sigmoid(x_g @ self.g1) @ self.g2
        k_NA, v_NA = self.k(x_k), self.values(self.v(x_v), x_v, attend)
        kk = F.normalize(wide(k_NA * self.k_k).unflatten(-1, self.heads), dim=-1)
        k_NA = k_NA * (1 + (rate - 1) * self.k_a)
        r, w, k, v, a = (t.unflatten(-1, self.heads) for t in (self.r(x_r), fade, k_NA, v_NA, wide(rate)))
        y_NHE, wkv = wkv7(attend.lengths, r, w, k, v, -kk, kk * a, state.get("wkv"))
        attend.keep(index, {"shift": shift, "wkv": wkv})
        own_NHE = (r * k * self.r_k).sum(-1, keepdim=True) * v
        return self.o((self.ln(y_NHE) + own_NHE.flatten(1)) * gate)


def _low_rank(d: int, rank: int, out: int) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.empty(d, rank)), nn.Parameter(torch.empty(rank, out))


def make(d: int, layer: Layer, index: int, rope: int | None) -> nn.Module:
    return TimeMix7(d, layer.ssm, index == 0)
