"""Normalisation layers in all the variants that released families use.

N flat tokens, D width (any leading shape is fine), H heads, E head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caravan.kernels.norm import rms_norm
from caravan.model.spec import Norm


class RMSNorm(nn.Module):
    """The Llama line's: cast, then multiply by the gain."""

    def __init__(self, d: int, norm: Norm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x_ND: Tensor) -> Tensor:
        return rms_norm(x_ND, self.weight, self.eps)


class WideNorm(nn.Module):
    """Every other variant: no gain, gain 1 + w, the gain multiplied in fp32, one gain per head [H, E]."""

    def __init__(self, shape: tuple[int, ...], norm: Norm) -> None:
        super().__init__()
        self.eps, self.width = norm.eps, shape[-1:]
        self.weight = nn.Parameter(torch.empty(shape)) if norm.affine else None
        self.bias = nn.Parameter(torch.empty(shape)) if norm.affine and norm.bias else None
        self.offset = 1.0 if norm.unit_offset else 0.0
        self.initialise()
        self.unit = self._rms if norm.kind == "rms" else self._layer
        gained = self._gain_wide if norm.gain_fp32 else self._gain
        self.gain = gained if norm.affine else self._cast

    @torch.no_grad()
    def initialise(self) -> None:
        """Gains that change nothing."""
        if self.weight is not None:
            self.weight.fill_(1.0 - self.offset)
        if self.bias is not None:
            self.bias.zero_()

    def _rms(self, wide: Tensor) -> Tensor:
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)

    def _layer(self, wide: Tensor) -> Tensor:
        return F.layer_norm(wide, self.width, eps=self.eps)

    def _cast(self, unit: Tensor, like: Tensor) -> Tensor:
        return unit.to(like.dtype)

    def _gain(self, unit: Tensor, like: Tensor) -> Tensor:
        assert self.weight is not None
        return self._shift(unit.to(like.dtype) * (self.weight + self.offset), self.bias)

    def _gain_wide(self, unit: Tensor, like: Tensor) -> Tensor:
        assert self.weight is not None
        bias = None if self.bias is None else self.bias.to(unit.dtype)
        return self._shift(unit * (self.weight.to(unit.dtype) + self.offset), bias).to(like.dtype)

    def _shift(self, y: Tensor, bias: Tensor | None) -> Tensor:
        return y if bias is None else y + bias

    def forward(self, x: Tensor) -> Tensor:
        return self.gain(self.unit(x.to(torch.promote_types(x.dtype, torch.float32))), x)


def make_norm(d: int | tuple[int, int], norm: Norm | None) -> nn.Module:
    """The module of a Norm of width d, or of one gain per head for a pair (H, E). None: nothing to do."""
    if norm is None:
        return nn.Identity()
    plain = isinstance(d, int) and not norm.unit_offset and not norm.gain_fp32
    if plain and norm.kind == "rms" and norm.affine:
        return RMSNorm(d, norm)  # type: ignore[arg-type]
    if plain and norm.kind == "layer":
        return nn.LayerNorm(d, eps=norm.eps, elementwise_affine=norm.affine, bias=norm.bias)  # type: ignore[arg-type]
    return WideNorm((d,) if isinstance(d, int) else d, norm)
