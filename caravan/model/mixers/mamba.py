"""Mamba: a selective state space behind a short convolution, gated (Gu & Dao 2023, arXiv:2312.00752, fig. 3).

N flat tokens, S segments, D width, I inner width, K taps, R rank of the time step, Z states per channel.

[x; z] = inp u;  x = silu(conv x);  [dt; B; C] = x_proj x, each optionally normalised;
delta = softplus(dt_proj dt + bias);  y = out((scan(x, delta, A, B, C) + D x) silu(z)),  A = -exp(A_log).

State: `conv` [S, I, K-1] the last inputs of the convolution, `ssm` [S, I, Z] in fp32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caravan.kernels.chunks import wide
from caravan.kernels.scan import selective_scan
from caravan.kernels.shortconv import short_conv
from caravan.model.mixers import knobs
from caravan.model.norms import make_norm
from caravan.model.positions import Angles
from caravan.model.spec import Layer


class Mamba(nn.Module):
    """Parameters `inp conv x dt A_log D out`, and `dtn bn cn` where the family normalises."""

    FP32 = ("A_log", "D")
    """Parameters that stay fp32 in memory and on disk: exp(A_log) is a speed, and rounding adds up."""

    def __init__(self, d: int, ssm: knobs.Mamba) -> None:
        super().__init__()
        inner, states = ssm.d_inner, ssm.d_state
        self.split = [ssm.dt_rank, states, states]
        self.inp = nn.Linear(d, 2 * inner, bias=ssm.bias)
        self.conv = nn.Conv1d(inner, inner, ssm.d_conv, groups=inner, bias=ssm.conv_bias)
        self.x = nn.Linear(inner, sum(self.split), bias=False)
        self.dt = nn.Linear(ssm.dt_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.empty(inner))
        self.out = nn.Linear(inner, d, bias=ssm.bias)
        self.dtn = make_norm(ssm.dt_rank, ssm.dt_norm)
        self.bn, self.cn = make_norm(states, ssm.dt_norm), make_norm(states, ssm.dt_norm)
        self.initialise()

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Rows of x and z; of time step, B and C."""
        return {"inp.weight": (self.inp.out_features // 2,) * 2, "x.weight": tuple(self.split)}

    @torch.no_grad()
    def initialise(self) -> None:
        """Speeds 1 ... Z in every channel (S4D-real) and time steps spread from 0.001 to 0.1, as in the
        paper's code, but evenly and not at random."""
        states = torch.arange(1, self.A_log.shape[1] + 1, dtype=torch.float32, device=self.A_log.device)
        self.A_log.copy_(states.log().expand_as(self.A_log))
        self.D.fill_(1.0)
        self.dt.bias.copy_(spread_time_steps(self.dt.bias))
        even_taps(self.conv)

    def forward(self, u_ND: Tensor, index: int, angles: Angles, attend: Any) -> Tensor:
        state = attend.state(index) or {}
        x_NI, z_NI = self.inp(u_ND).chunk(2, -1)
        weight_IK = self.conv.weight.squeeze(1)
        x_NI, conv = short_conv(attend.lengths, x_NI, weight_IK, self.conv.bias, state.get("conv"))
        x_NI = F.silu(x_NI)
        dt_NR, B_NZ, C_NZ = self.x(x_NI).split(self.split, -1)
        # the bias is added once, in fp32, inside the softplus
        dt_NI = wide(F.linear(self.dtn(dt_NR), self.dt.weight)) + wide(self.dt.bias)
        A_IZ = -torch.exp(wide(self.A_log))
        y_NI, ssm = selective_scan(
            attend.lengths, x_NI, F.softplus(dt_NI), A_IZ, self.bn(B_NZ), self.cn(C_NZ), state.get("ssm")
        )
        attend.keep(index, {"conv": conv, "ssm": ssm})
        y_NI = (y_NI + wide(self.D) * x_NI) * F.silu(wide(z_NI))
        return self.out(y_NI.to(u_ND.dtype))


def spread_time_steps(like: Tensor, least: float = 1e-3, most: float = 0.1) -> Tensor:
    """Biases whose softplus runs from `least` to `most`, evenly in the logarithm; the shape of `like`."""
    steps = torch.linspace(math.log(least), math.log(most), like.numel(), device=like.device).exp()
    return (steps + torch.log(-torch.expm1(-steps))).view_as(like)


def even_taps(conv: nn.Conv1d) -> None:
    """Rescale a depthwise filter to taps of standard deviation 1 / sqrt(taps): what comes out is as large as
    what goes in."""
    conv.weight.mul_(conv.weight.shape[-1] ** -0.5 / conv.weight.std())


def make(d: int, layer: Layer, index: int, rope: int | None) -> nn.Module:
    return Mamba(d, layer.ssm)
