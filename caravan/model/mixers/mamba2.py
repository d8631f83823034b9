"""Mamba-2: a state space with one decay per head (Dao & Gu 2024, arXiv:2405.21060, section 7).

N flat tokens, S segments, D width, H heads, P head width, G groups, Z states, K taps, I = H P inner width.

[z; x; B; C; dt] = inp u;  [x; B; C] = silu(conv [x; B; C]);  delta = softplus(dt + bias), bounded;
y = out(norm((ssd(x, delta, A, B, C) + D x) silu(z))),  A = -exp(A_log), the norm RMS over I / G channels.

State: `conv` [S, I + 2 G Z, K-1] the last inputs of the convolution, `ssm` [S, H, P, Z] in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caravan.kernels.chunks import wide
from caravan.kernels.scan import ssd
from caravan.kernels.shortconv import short_conv
from caravan.model.mixers import knobs
from caravan.model.mixers.mamba import even_taps, spread_time_steps
from caravan.model.positions import Angles
from caravan.model.spec import Layer


class GatedNorm(nn.Module):
    """RMS norm of y silu(z) within groups of channels, in fp32; cast, then multiplied by the gain."""

    def __init__(self, d: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, y_NI: Tensor, z_NI: Tensor) -> Tensor:
        gated = (wide(y_NI) * F.silu(wide(z_NI))).unflatten(-1, (self.groups, -1))
        unit = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * unit.flatten(-2).to(z_NI.dtype)


class Mamba2(nn.Module):
    """Parameters `inp conv dt_bias A_log D norm out`."""

    FP32 = ("A_log", "D", "dt_bias")

    def __init__(self, d: int, ssm: knobs.Mamba2) -> None:
        super().__init__()
        self.ssm = ssm
        inner, shared = ssm.n_head * ssm.head_dim, ssm.n_group * ssm.d_state
        mixed = inner + 2 * shared
        self.split = [inner, mixed, ssm.n_head]
        self.parts = [inner, shared, shared]
        self.inp = nn.Linear(d, sum(self.split), bias=ssm.bias)
        self.conv = nn.Conv1d(mixed, mixed, ssm.d_conv, groups=mixed, bias=ssm.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(ssm.n_head))
        self.A_log = nn.Parameter(torch.empty(ssm.n_head))
        self.D = nn.Parameter(torch.empty(ssm.n_head))
        self.norm = GatedNorm(inner, ssm.n_group, ssm.eps)
        self.out = nn.Linear(inner, d, bias=ssm.bias)
        self.initialise()

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Rows of z, x, B, C and the time step."""
        return {"inp.weight": (self.split[0], *self.parts, self.split[2])}

    @torch.no_grad()
    def initialise(self) -> None:
        """Speeds 1 ... H, time steps spread from 0.001 to 0.1 over the heads."""
        heads = torch.arange(1, len(self.A_log) + 1, dtype=torch.float32, device=self.A_log.device)
        self.A_log.copy_(heads.log())
        self.D.fill_(1.0)
        self.dt_bias.copy_(spread_time_steps(self.dt_bias))
        even_taps(self.conv)

    def forward(self, u_ND: Tensor, index: int, angles: Angles, attend: Any) -> Tensor:
        ssm, state = self.ssm, attend.state(index) or {}
        z_NI, mixed, dt_NH = self.inp(u_ND).split(self.split, -1)
        weight = self.conv.weight.squeeze(1)
        mixed, conv = short_conv(attend.lengths, mixed, weight, self.conv.bias, state.get("conv"))
        x_NI, B, C = F.silu(mixed).split(self.parts, -1)
        x_NHP = x_NI.unflatten(-1, (ssm.n_head, ssm.head_dim))
        B_NGZ, C_NGZ = (t.unflatten(-1, (ssm.n_group, ssm.d_state)) for t in (B, C))
        dt_NH = F.softplus(wide(dt_NH) + wide(self.dt_bias)).clamp(*ssm.dt_limit)
        A_H = -torch.exp(wide(self.A_log))
        y_NHP, last = ssd(attend.lengths, x_NHP, dt_NH, A_H, B_NGZ, C_NGZ, state.get("ssm"))
        attend.keep(index, {"conv": conv, "ssm": last})
        y_NHP = y_NHP + wide(self.D)[:, None] * x_NHP
        return self.out(self.norm(y_NHP.flatten(1), z_NI))


def make(d: int, layer: Layer, index: int, rope: int | None) -> nn.Module:
    return Mamba2(d, layer.ssm)
