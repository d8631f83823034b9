"""RWKV's channel mixing, generation 7 (Peng et al. 2025, arXiv:2503.14456, section 4.2): no receptance.

N flat tokens, S segments, D width, F inner width.

With x' the token before x: y = V(relu(K(x + (x' - x) mix_k))^2). State: `shift` [S, D], the last token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from caravan.kernels.shortconv import token_shift
from caravan.model.activations import relu2
from caravan.model.spec import FFN


class ChannelMix7(nn.Module):
    """Parameters `mix_k k v`."""

    def __init__(self, d: int, ffn: FFN) -> None:
        super().__init__()
        self.mix_k = nn.Parameter(torch.empty(d))
        self.k = nn.Linear(d, ffn.d_ff, bias=False)
        self.v = nn.Linear(ffn.d_ff, d, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Half of each neighbour."""
        self.mix_k.fill_(0.5)

    def forward(self, x_ND: Tensor, index: int, attend: Any) -> Tensor:
        state = attend.state(-1 - index) or {}
        before_ND, shift = token_shift(attend.lengths, x_ND, state.get("shift"))
        attend.keep(-1 - index, {"shift": shift})
        return self.v(relu2(self.k(x_ND + (before_ND - x_ND) * self.mix_k)))


make = ChannelMix7
