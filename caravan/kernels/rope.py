"""Rotary position embedding in the rotate-half layout (Su et al. 2021, arXiv:2104.09864).

N flat tokens, H query heads, K key/value heads, E head width, F frequencies (2F <= E rotary dimensions).

cos and sin are computed in fp32 by the caller and cast to the activations' type here, as in the Llama line.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def reference_rotate(x_NHE: Tensor, cos_NF: Tensor, sin_NF: Tensor) -> Tensor:
    """Turn the pairs (x[f], x[f + F]) of every head by the given angles; x[2F:] passes unchanged."""
    half = cos_NF.shape[-1]
    cos, sin = cos_NF.to(x_NHE.dtype).unsqueeze(1), sin_NF.to(x_NHE.dtype).unsqueeze(1)
    a, b, rest = x_NHE[..., :half], x_NHE[..., half : 2 * half], x_NHE[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _turn(x: Tensor, angles: tuple[Tensor, Tensor], out: Tensor, sign: float) -> None:
    """out = x turned by sign * angle; the angles are cos and sin, [N, 1, F] in x's type."""
    cos, sin = angles
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out[..., half : 2 * half]).addcmul_(a, sin, value=sign)
    if x.shape[-1] > 2 * half:
        out[..., 2 * half :] = x[..., 2 * half :]


def _cast(x: Tensor, cos_NF: Tensor, sin_NF: Tensor) -> tuple[Tensor, Tensor]:
    return cos_NF.to(x.dtype).unsqueeze(1), sin_NF.to(x.dtype).unsqueeze(1)


class Rotate(torch.autograd.Function):
    """`reference_rotate`; the gradient is the rotation back, so nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: Any, x_NHE: Tensor, cos_NF: Tensor, sin_NF: Tensor) -> Tensor:
        ctx.angles = _cast(x_NHE, cos_NF, sin_NF)
        out = torch.empty(x_NHE.shape, dtype=x_NHE.dtype, device=x_NHE.device)
        _turn(x_NHE, ctx.angles, out, 1.0)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_NHE: Tensor) -> tuple[Tensor | None, ...]:
        out = torch.empty(d_NHE.shape, dtype=d_NHE.dtype, device=d_NHE.device)
        _turn(d_NHE, ctx.angles, out, -1.0)
        return out, None, None


class SplitRotate(torch.autograd.Function):
    """Fused [q; k; v] heads -> q and k rotated, v as it is; one buffer forwards, one gradient buffer
    backwards."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos_NF: Tensor, sin_NF: Tensor, n_head: int, n_kv: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.angles, ctx.heads = _cast(qkv, cos_NF, sin_NF), (n_head, n_head + n_kv)
        turned = n_head + n_kv
        out = torch.empty_like(qkv[:, :turned])
        _turn(qkv[:, :turned], ctx.angles, out, 1.0)
        return out[:, :n_head], out[:, n_head:], qkv[:, turned:].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        first, second = ctx.heads
        out = torch.empty(dq.shape[0], second + dv.shape[1], dq.shape[2], dtype=dq.dtype, device=dq.device)
        _turn(dq, ctx.angles, out[:, :first], -1.0)
        _turn(dk, ctx.angles, out[:, first:second], -1.0)
        out[:, second:] = dv
        return out, None, None, None, None


def rotate(x_NHE: Tensor, cos_NF: Tensor, sin_NF: Tensor) -> Tensor:
    """Same as `reference_rotate`, which a compiler is given as it is: it fuses and differentiates itself."""
    if torch.compiler.is_compiling():
        return reference_rotate(x_NHE, cos_NF, sin_NF)
    return Rotate.apply(x_NHE, cos_NF, sin_NF)


def split_rotate(
    qkv: Tensor, cos_NF: Tensor, sin_NF: Tensor, n_head: int, n_kv: int
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, H + 2K, E] -> rotated q [N, H, E], rotated k [N, K, E], v [N, K, E]."""
    if torch.compiler.is_compiling():
        q_NHE, k_NKE, v_NKE = qkv.split([n_head, n_kv, n_kv], 1)
        return rotate(q_NHE, cos_NF, sin_NF), rotate(k_NKE, cos_NF, sin_NF), v_NKE
    return SplitRotate.apply(qkv, cos_NF, sin_NF, n_head, n_kv)
