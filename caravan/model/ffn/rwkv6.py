"""RWKV's channel mixing, generation 6 (Peng et al. 2024, arXiv:2404.05892, section 4.2): generation 5 with
the shift written the other way round, x + (x' - x) mix.

N flat tokens, S segments, D width, F inner width. State: `shift` [S, D], the last token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from caravan.kernels.shortconv import token_shift
from caravan.model.activations import relu2
from caravan.model.spec import FFN


class ChannelMix6(nn.Module):
    """Parameters `mix_k mix_r k v r`."""

    def __init__(self, d: int, ffn: FFN) -> None:
        super().__init__()
        self.mix_k, self.mix_r = (nn.Parameter(torch.empty(d)) for _ in range(2))
        self.k = nn.Linear(d, ffn.d_ff, bias=False)
        self.r = nn.Linear(d, d, bias=False)
        self.v = nn.Linear(ffn.d_ff, d, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Half of each neighbour."""
        self.mix_k.fill_(0.5)
        self.mix_r.fill_(0.5)

    def forward(self, x_ND: Tensor, index: int, attend: Any) -> Tensor:
        state = attend.state(-1 - index) or {}
        before_ND, shift = token_shift(attend.lengths, x_ND, state.get("shift"))
        attend.keep(-1 - index, {"shift": shift})
        delta_ND = before_ND - x_ND
        k_NF = self.k(x_ND + delta_ND * self.mix_k)
        return torch.sigmoid(self.r(x_ND + delta_ND * self.mix_r)) * self.v(relu2(k_NF))


make = ChannelMix6
