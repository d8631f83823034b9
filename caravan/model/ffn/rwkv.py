"""RWKV's channel mixing, generations 4 and 5 (Peng et al. 2023, arXiv:2305.13048, eq. 19-21).

N flat tokens, S segments, D width, F inner width.

With x' the token before x: k = K(x mix_k + x' (1 - mix_k)), r likewise; y = sigmoid(r) V(relu(k)^2).
State: `shift` [S, D], the last token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from caravan.kernels.shortconv import token_shift
from caravan.model.activations import relu2
from caravan.model.spec import FFN


class ChannelMix(nn.Module):
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
        k_NF = self.k(x_ND * self.mix_k + before_ND * (1 - self.mix_k))
        r_ND = self.r(x_ND * self.mix_r + before_ND * (1 - self.mix_r))
        return torch.sigmoid(r_ND) * self.v(relu2(k_NF))


make = ChannelMix
