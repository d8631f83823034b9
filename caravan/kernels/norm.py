"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) in the order of the Llama line: cast, then multiply.

N flat tokens, D width (any leading shape is fine).
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_rms_norm(x_ND: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in fp32 (or wider), cast to x's dtype, then times the gain."""
    wide_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
    unit_ND = wide_ND * torch.rsqrt(wide_ND.pow(2).mean(-1, keepdim=True) + eps)
    return gain_D * unit_ND.to(x_ND.dtype)


def rms_norm(x_ND: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """Same as `reference_rms_norm`."""
    return reference_rms_norm(x_ND, gain_D, eps)
