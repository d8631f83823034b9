"""SwiGLU's inner product silu(gate) * up on a fused [gate; up] projection (Shazeer 2020, arXiv:2002.05202).

N flat tokens, F inner width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def reference_swiglu(inner: Tensor) -> Tensor:
    """[N, 2F] -> [N, F]."""
    gate, up = inner.chunk(2, -1)
    return F.silu(gate) * up


class SwiGLU(torch.autograd.Function):
    """Keeps only the fused projection, and writes both gradients into one buffer.

    With s = sigmoid(g), a = g s:  dup = dy a,  dg = dy up (s + a (1 - s)).
    """

    @staticmethod
    def forward(ctx: Any, inner: Tensor) -> Tensor:
        ctx.save_for_backward(inner)
        gate, up = inner.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (inner,) = ctx.saved_tensors
        gate, up = inner.chunk(2, -1)
        out = torch.empty_like(inner)
        dgate, dup = out.chunk(2, -1)
        torch.mul(dy, F.silu(gate), out=dup)
        torch.ops.aten.silu_backward.grad_input(torch.mul(dy, up), gate, grad_input=dgate)
        return out


def swiglu(inner: Tensor) -> Tensor:
    """Same as `reference_swiglu`, in few passes and with little saved."""
    if torch.compiler.is_compiling():  # which fuses by itself, and takes no out= into a view
        return reference_swiglu(inner)
    return SwiGLU.apply(inner)
