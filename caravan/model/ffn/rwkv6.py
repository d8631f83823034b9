"""RWKV's channel mixing, generation 6 (Peng et al. 2024, arXiv:2404.05892, section 4.2): generation 5 with
the shift written the other way round, x + (x' - x) mix.

N flat tokens, S segments, D width, F inner width. State: `shift` [S, D], the last token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from caravan.kernels.shortconv import token_shift
from caravan.model.activations import relu2
from caravan.model.ffn.rwkv import ChannelMix


class ChannelMix6(ChannelMix):
    """The parameters of v4 and v5; shares are of the way to the neighbour."""

    def forward(self, x_ND: Tensor, index: int, attend: Any) -> Tensor:
        state = attend.state(-1 - index) or {}
        before_ND, shift = token_shift(attend.lengths, x_ND, state.get("shift"))
        attend.keep(-1 - index, {"shift": shift})
        delta_ND = before_ND - x_ND
        k_NF = self.k(x_ND + delta_ND * self.mix_k)
        return torch.sigmoid(self.r(x_ND + delta_ND * self.mix_r)) * self.v(relu2(k_NF))


make = ChannelMix6
