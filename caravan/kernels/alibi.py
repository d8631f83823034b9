"""Slopes of ALiBi, the linear bias on attention scores (Press et al. 2022, arXiv:2108.12409)."""

from __future__ import annotations

import torch
from torch import Tensor


def alibi_slopes(n_head: int, alibi_max: float = 8.0) -> Tensor:
    """[H] slopes in float32, 2^(-alibi_max * i / n) for i = 1 .. n where n is a power of two. For another
    number of heads: of the next power of two, first every second slope, then those in between."""
    n = 1 << (n_head - 1).bit_length()
    slopes = torch.exp2(-alibi_max * torch.arange(1, n + 1, dtype=torch.float32) / n)
    return slopes if n == n_head else torch.cat([slopes[1::2], slopes[::2]])[:n_head]
