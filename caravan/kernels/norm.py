"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) in the order of the Llama line: cast, then multiply.

N flat tokens, D width (any leading shape is fine).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def reference_rms_norm(x_ND: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in fp32 (or wider), cast to x's dtype, then times the gain."""
    wide_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
    unit_ND = wide_ND * torch.rsqrt(wide_ND.pow(2).mean(-1, keepdim=True) + eps)
    return gain_D * unit_ND.to(x_ND.dtype)


class RMSNormFunction(torch.autograd.Function):
    """`reference_rms_norm` that keeps only x and one number per token for the backward pass.

    With u = x r, r = rsqrt(mean(x^2) + eps), y = g u:  dg = sum_N(dy u),  dx = r (g dy - u mean_D(g dy u)).
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        unit_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32), copy=True)
        norm_N1 = torch.linalg.vector_norm(unit_ND, dim=-1, keepdim=True)
        rstd_N1 = norm_N1.pow_(2).div_(x_ND.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_ND, gain_D, rstd_N1)
        return unit_ND.mul_(rstd_N1).to(x_ND.dtype).mul_(gain_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gain_D, rstd_N1 = ctx.saved_tensors
        unit_ND = x_ND.to(rstd_N1.dtype, copy=True).mul_(rstd_N1)
        product_ND = dy_ND * unit_ND
        dgain_D = product_ND.flatten(0, -2).sum(0).to(gain_D.dtype) if ctx.needs_input_grad[1] else None
        wide_D = gain_D.to(rstd_N1.dtype)
        mean_N1 = (product_ND @ wide_D).unsqueeze(-1).div_(x_ND.shape[-1])
        dx_ND = torch.mul(dy_ND, wide_D, out=product_ND).addcmul_(unit_ND, mean_N1, value=-1).mul_(rstd_N1)
        return dx_ND.to(x_ND.dtype), dgain_D, None


def rms_norm(x_ND: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """Same as `reference_rms_norm`, in few passes and with little saved."""
    return RMSNormFunction.apply(x_ND, gain_D, eps)
