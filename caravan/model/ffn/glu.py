"""The gated feed-forward layer (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from caravan.kernels.glu import swiglu
from caravan.model.activations import ACTIVATIONS
from caravan.model.spec import FFN


class GLU(nn.Module):
    """(act(x G) * x U) B with [G; U] fused."""

    def __init__(self, d: int, ffn: FFN) -> None:
        super().__init__()
        self.inp = nn.Linear(d, 2 * ffn.d_ff, bias=ffn.bias)
        self.out = nn.Linear(ffn.d_ff, d, bias=ffn.bias)
        self.act = ACTIVATIONS[ffn.act]
        self.inner = swiglu if ffn.act == "silu" else self._inner

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Rows of gate and up."""
        return {"inp.weight": (self.inp.out_features // 2,) * 2}

    def _inner(self, inner: Tensor) -> Tensor:
        gate, up = inner.chunk(2, -1)
        return self.act(gate) * up

    def forward(self, x_ND: Tensor, index: int = 0, attend: Any = None) -> Tensor:
        return self.out(self.inner(self.inp(x_ND)))


make = GLU
