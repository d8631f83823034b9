"""Rotary position embedding in the rotate-half layout (Su et al. 2021, arXiv:2104.09864).

N flat tokens, H heads, E head width, R rotary dimensions (R <= E), F = R / 2 frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_NHE: Tensor, cos_NF: Tensor, sin_NF: Tensor) -> Tensor:
    """Turn the pairs (x[f], x[f + F]) of each head by the angle whose cos and sin are given; x[2F:] passes."""
    half = cos_NF.shape[-1]
    cos, sin = cos_NF.to(x_NHE.dtype).unsqueeze(1), sin_NF.to(x_NHE.dtype).unsqueeze(1)
    a, b, rest = x_NHE[..., :half], x_NHE[..., half : 2 * half], x_NHE[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
