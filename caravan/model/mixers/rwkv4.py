"""RWKV-4's time mixing (Peng et al. 2023, arXiv:2305.13048, section 3.1).

N flat tokens, S segments, D width, A channels of the average.

With x' the token before x: k = K(x mix_k + x' (1 - mix_k)), v and r likewise, y = o(sigmoid(r) wkv(k, v)),
where wkv fades by exp(-exp(decay)) per token and gives the current token the bonus `first`.

State: `shift` [S, D] the last token, `wkv` [S, 3, A] numerator, denominator and largest exponent in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from caravan.kernels.chunks import wide
from caravan.kernels.shortconv import token_shift
from caravan.kernels.wkv import wkv4
from caravan.model.mixers import knobs
from caravan.model.positions import Angles
from caravan.model.spec import Layer


class TimeMix4(nn.Module):
    """Parameters `decay first mix_k mix_v mix_r k v r o`."""

    FP32 = ("decay", "first")

    def __init__(self, d: int, ssm: knobs.Rwkv4) -> None:
        super().__init__()
        self.decay, self.first = (nn.Parameter(torch.empty(ssm.d_att)) for _ in range(2))
        self.mix_k, self.mix_v, self.mix_r = (nn.Parameter(torch.empty(d)) for _ in range(3))
        self.k, self.v, self.r = (nn.Linear(d, ssm.d_att, bias=False) for _ in range(3))
        self.o = nn.Linear(ssm.d_att, d, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Decays from very slow to fast over the channels, half of each neighbour in the shift."""
        self.decay.copy_(torch.linspace(-5.0, 3.0, len(self.decay), device=self.decay.device))
        self.first.fill_(-1.2)
        for mix in (self.mix_k, self.mix_v, self.mix_r):
            mix.fill_(0.5)

    def forward(self, x_ND: Tensor, index: int, angles: Angles, attend: Any) -> Tensor:
        state = attend.state(index) or {}
        before_ND, shift = token_shift(attend.lengths, x_ND, state.get("shift"))
        k_NA = self.k(x_ND * self.mix_k + before_ND * (1 - self.mix_k))
        v_NA = self.v(x_ND * self.mix_v + before_ND * (1 - self.mix_v))
        r_NA = self.r(x_ND * self.mix_r + before_ND * (1 - self.mix_r))
        fade_A = -torch.exp(wide(self.decay))
        y_NA, wkv = wkv4(attend.lengths, fade_A, wide(self.first), k_NA, v_NA, state.get("wkv"))
        attend.keep(index, {"shift": shift, "wkv": wkv})
        return self.o(torch.sigmoid(r_NA) * y_NA.to(x_ND.dtype))


def make(d: int, layer: Layer, index: int, rope: int | None) -> nn.Module:
    return TimeMix4(d, layer.ssm)
