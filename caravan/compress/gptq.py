"""GPTQ: round one input column at a time and let the columns still to come make up for the error.

Frantar et al. 2022 (arXiv:2210.17323). For a layer y = W x with inputs seen on calibration text, minimise
||(W - Q) X||^2. With H = sum x x^T (damped by 1 % of its mean diagonal) and U the upper Cholesky factor of
H^-1, column i is rounded, its error e = (w_i - q_i) / U_ii, and e U_i,j is taken off every later column j.

Columns go in order of falling diag H (act-order), with *static groups*: scales come from the original
weights, so that inference needs no reordering (and no group ever sees half-updated weights, a trap of the
original code).

Shapes: N outputs, K inputs, G groups per row, M rows of calibration activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from caravan.compress import rtn

_BLOCK = 128


class Hessian:
    """Running sum of x x^T of one layer's inputs, in float32; the scale cancels, damping being relative."""

    def __init__(self) -> None:
        self.sum_KK: Tensor | None = None
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Take in [..., K] activations."""
        x_MK = x.detach().reshape(-1, x.shape[-1]).float()
        product = x_MK.T @ x_MK
        self.sum_KK = product if self.sum_KK is None else self.sum_KK + product
        self.rows += x_MK.shape[0]

    def matrix(self) -> Tensor:
        """[K, K] mean of x x^T."""
        assert self.sum_KK is not None, "no activations were added"
        return self.sum_KK / self.rows


def inverse_factor(hessian_KK: Tensor, damping: float) -> Tensor:
    """U with U^T U = (H + damping * mean diag * I)^-1; the damping grows tenfold until the factor exists."""
    mean = float(hessian_KK.diagonal().mean())
    for _ in range(8):
        damped = hessian_KK.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return upper
        damping *= 10
    raise ValueError("the second moments of the calibration activations are not finite")


def quantise(
    weight_NK: Tensor,
    hessian_KK: Tensor,
    bits: int,
    group: int,
    dtype: torch.dtype = torch.float32,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """(q int8 [N, K], scale [N, K / group]) for inputs with second moments `hessian_KK`."""
    scale_NG = rtn.scales(weight_NK, bits, group, dtype)
    W = weight_NK.float().clone()
    H = hessian_KK.float().clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1.0
    W[:, dead] = 0.0
    order = H.diagonal().argsort(descending=True, stable=True)
    W, H = W[:, order], H[order][:, order]
    scale_NK = scale_NG.float().repeat_interleave(group, 1)[:, order]
    U = inverse_factor(H, damping)
    limit = 1 << (bits - 1)
    q_NK = torch.empty_like(W)
    for start in range(0, W.shape[1], _BLOCK):
        stop = min(start + _BLOCK, W.shape[1])
        errors = torch.zeros_like(W[:, start:stop])
        for i in range(start, stop):
            q = (W[:, i] / scale_NK[:, i]).round().clamp(-limit, limit - 1)
            q_NK[:, i] = q
            error = (W[:, i] - q * scale_NK[:, i]) / U[i, i]
            W[:, i:stop] -= error.unsqueeze(1) * U[i, i:stop]
            errors[:, i - start] = error
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return q_NK[:, order.argsort()].to(torch.int8), scale_NG
