"""Hyena: a long convolution between two gates (Poli et al. 2023, arXiv:2302.10866), its filter in modal form
(Massaroli et al. 2023, arXiv:2310.18780), as StripedHyena has it.

N flat tokens, S segments, D width, K taps, Z modes per channel.

[x2; x1; v] = short filter of inp u (per head: x2, x1, v lie together);  y = out(x2 (h * (x1 v) + D x1 v)),
h_t = Re sum_z residue_z pole_z^t: an FFT over whole segments, the recurrence when every segment has one
token.

State: `fir` [S, 3 D, K-1] the last inputs of the short filter, `iir` [S, D, Z, 2] the modes (real,
imaginary) in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from caravan.kernels.chunks import wide
from caravan.kernels.longconv import long_conv, long_conv_state, long_conv_step
from caravan.kernels.shortconv import short_conv
from caravan.model.mixers import knobs
from caravan.model.mixers.mamba import even_taps
from caravan.model.positions import Angles
from caravan.model.spec import Layer


class Hyena(nn.Module):
    """Parameters `inp conv D poles residues out`; poles and residues are [D, Z, 1, 2] as on disk."""

    FP32 = ("poles", "residues")

    def __init__(self, d: int, ssm: knobs.Hyena) -> None:
        super().__init__()
        self.heads = ssm.n_head if ssm.column_split else 1
        self.inp = nn.Linear(d, 3 * d)
        self.conv = nn.Conv1d(3 * d, 3 * d, ssm.d_conv, groups=3 * d, bias=ssm.conv_bias)
        self.D = nn.Parameter(torch.empty(d))
        self.poles = nn.Parameter(torch.empty(d, ssm.d_state, 1, 2))
        self.residues = nn.Parameter(torch.empty(d, ssm.d_state, 1, 2))
        self.out = nn.Linear(d, d)
        self.initialise()

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Rows of x2, x1 and v, in every head where heads are stored apart."""
        return {"inp.weight": (self.D.numel() // self.heads,) * 3}

    @torch.no_grad()
    def initialise(self) -> None:
        """Poles of magnitude 0.5 ... 0.999 over the channels, each mode at its own frequency."""
        d, modes = self.poles.shape[:2]
        size = torch.linspace(0.5, 0.999, d, device=self.poles.device)[:, None]
        angle = torch.arange(modes, device=self.poles.device) * (torch.pi / modes)
        self.poles.copy_(torch.stack([size * angle.cos(), size * angle.sin()], -1).unsqueeze(2))
        self.residues.copy_(
            torch.tensor([1.0 / modes, 0.0], device=self.poles.device).expand_as(self.residues)
        )
        self.D.zero_()
        even_taps(self.conv)

    def forward(self, u_ND: Tensor, index: int, angles: Angles, attend: Any) -> Tensor:
        state, lengths = attend.state(index) or {}, attend.lengths
        weight = self.conv.weight.squeeze(1)
        z, fir = short_conv(lengths, self.inp(u_ND), weight, self.conv.bias, state.get("fir"))
        x2, x1, v = (t.flatten(1) for t in z.unflatten(-1, (self.heads, 3, -1)).unbind(2))
        x1v_ND = x1 * v
        poles, residues, first = self.poles.squeeze(2), self.residues.squeeze(2), state.get("iir")
        if first is not None and max(lengths) == 1:
            y_ND, iir = long_conv_step(x1v_ND, poles, residues, first)
        else:
            y_ND = long_conv(lengths, x1v_ND, poles, residues, first)
            iir = long_conv_state(lengths, x1v_ND.detach(), poles.detach(), first)
        attend.keep(index, {"fir": fir, "iir": iir})
        y_ND = x2 * (y_ND + wide(self.D) * x1v_ND)
        return self.out(y_ND.to(u_ND.dtype))


def make(d: int, layer: Layer, index: int, rope: int | None) -> nn.Module:
    return Hyena(d, layer.ssm)
