"""The plain feed-forward layer act(x A) B (Vaswani et al. 2017, arXiv:1706.03762)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from caravan.model.activations import ACTIVATIONS
from caravan.model.spec import FFN


class MLP(nn.Module):
    """act(x A) B."""

    def __init__(self, d: int, ffn: FFN) -> None:
        super().__init__()
        self.inp = nn.Linear(d, ffn.d_ff, bias=ffn.bias)
        self.out = nn.Linear(ffn.d_ff, d, bias=ffn.bias)
        self.act = ACTIVATIONS[ffn.act]

    def forward(self, x_ND: Tensor, index: int = 0, attend: Any = None) -> Tensor:
        return self.out(self.act(self.inp(x_ND)))


make = MLP
