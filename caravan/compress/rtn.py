"""Round to nearest: the simplest quantisation, and the grid all others use.

Symmetric, per group of inputs: s = max|w| / (2^(bits-1) - 1), q = round(w / s), kept inside -2^(bits-1) ..
2^(bits-1) - 1. The scale is rounded to the type it is stored in *before* q is chosen, so nothing is lost by
storing it in 16 bits.

Shapes: N outputs, K inputs, G groups per row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scales(weight_NK: Tensor, bits: int, group: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, K / group] scales of the symmetric grid, in `dtype`; K must be a multiple of `group`."""
    N, K = weight_NK.shape
    assert K % group == 0, (K, group)
    largest = weight_NK.float().abs().view(N, K // group, group).amax(-1)
    scale = (largest / ((1 << (bits - 1)) - 1)).to(dtype)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def to_grid(weight_NK: Tensor, scale_NG: Tensor, bits: int) -> Tensor:
    """Nearest integers, int8 [N, K]."""
    N, K = weight_NK.shape
    limit = 1 << (bits - 1)
    ratio = weight_NK.float().view(N, scale_NG.shape[1], -1) / scale_NG.float().unsqueeze(-1)
    return ratio.round_().clamp_(-limit, limit - 1).view(N, K).to(torch.int8)


def quantise(
    weight_NK: Tensor, bits: int, group: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(q int8 [N, K], scale [N, K / group])."""
    scale_NG = scales(weight_NK, bits, group, dtype)
    return to_grid(weight_NK, scale_NG, bits), scale_NG
