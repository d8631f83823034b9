"""Hyena's long filter in modal form, by FFT or step by step, beside the loop that defines it.

N flat tokens, S segments, D channels, Z modes per channel, T time in a row, F frequencies; M chunks of C
tokens. Complex numbers are pairs (real, imaginary) on the last axis. Everything is computed in fp32 or wider.

A channel's filter is h_t = Re sum_z residue_z pole_z^t (Massaroli et al. 2023, arXiv:2310.18780, section 3):
the same outputs come from a convolution with h, which an FFT does at once for a whole segment, and from the
recurrence x_t = pole x_{t-1} + u_t, y_t = Re sum_z residue_z x_t, which needs Z numbers per channel to go on.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from caravan.kernels.attention import buckets
from caravan.kernels.chunks import Collect, Spread, carry, plan, wide

STATE_CHUNK = 64
TINY = 1e-30
"""Added under the logarithm of a pole's magnitude: a pole at 0 is a filter that ends at once."""


def reference_long_conv(
    lengths: Sequence[int],
    u_ND: Tensor, poles_DZ2: Tensor, residues_DZ2: Tensor, first_SDZ2: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence, token by token -> outputs [N, D] and last states [S, D, Z, 2]."""
    poles, residues = torch.view_as_complex(poles_DZ2), torch.view_as_complex(residues_DZ2)
    outputs, last, t = [], [], 0
    for s, length in enumerate(lengths):
        x = torch.zeros_like(poles) if first_SDZ2 is None else torch.view_as_complex(first_SDZ2[s])
        for u_D in u_ND[t : t + length]:
            x = poles * x + u_D[:, None]
            outputs.append((residues * x).sum(-1).real)
        t += length
        last.append(torch.view_as_real(x))
    return torch.stack(outputs), torch.stack(last)


def powers(poles_DZ2: Tensor, exponent_T: Tensor) -> tuple[Tensor, Tensor]:
    """[T, D, Z] real and imaginary part of pole ** exponent."""
    real, imaginary = poles_DZ2.unbind(-1)
    size = 0.5 * torch.log(real.square() + imaginary.square() + TINY)
    angle = torch.atan2(imaginary, real)
    t_T11 = exponent_T.to(poles_DZ2.dtype)[:, None, None]
    length = torch.exp(t_T11 * size)
    return length * torch.cos(t_T11 * angle), length * torch.sin(t_T11 * angle)


def times(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Product of complex numbers."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def impulse(poles_DZ2: Tensor, residues_DZ2: Tensor, length: int) -> Tensor:
    """[T, D] the filter h_0 ... h_{T-1}."""
    real, imaginary = powers(poles_DZ2, torch.arange(length, device=poles_DZ2.device))
    return (residues_DZ2[..., 0] * real - residues_DZ2[..., 1] * imaginary).sum(-1)


def long_conv(
    lengths: tuple[int, ...],
    u_ND: Tensor, poles_DZ2: Tensor, residues_DZ2: Tensor, first_SDZ2: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Outputs [N, D] of the reference, one FFT per bucket of segments of like length; fp32 or wider."""
    u, poles, residues = wide(u_ND), wide(poles_DZ2), wide(residues_DZ2)
    rows, cell_N = _rows(lengths, u.device)
    h_TD = impulse(poles, residues, max(width for _, width in rows))
    spread = Spread.apply(u, cell_N, sum(count * width for count, width in rows))
    parts = []
    for (count, width), row in zip(rows, spread.split([count * width for count, width in rows]), strict=True):
        size = _fft_size(2 * width)
        u_BFD = torch.fft.rfft(row.view(count, width, -1), n=size, dim=1)
        h_FD = torch.fft.rfft(h_TD[:width], n=size, dim=0)
        parts.append(torch.fft.irfft(u_BFD * h_FD, n=size, dim=1)[:, :width].flatten(0, 1))
    y_ND = Collect.apply(torch.cat(parts), cell_N)
    return y_ND if first_SDZ2 is None else y_ND + _echo(lengths, poles, residues, first_SDZ2)


def _echo(lengths: tuple[int, ...], poles: Tensor, residues: Tensor, first_SDZ2: Tensor) -> Tensor:
    """[N, D] what the states before the segments still contribute: Re sum residue pole^(t+1) x_{-1}."""
    start = torch.cat([torch.arange(1, n + 1, device=poles.device) for n in lengths])
    segment_N = torch.arange(len(lengths), device=poles.device).repeat_interleave(
        torch.tensor(lengths, device=poles.device), output_size=sum(lengths)
    )
    state = times(residues.unbind(-1), first_SDZ2.to(poles.dtype).unbind(-1))  # type: ignore[arg-type]
    now = powers(poles, start)
    return (now[0] * state[0][segment_N] - now[1] * state[1][segment_N]).sum(-1)


def long_conv_state(
    lengths: tuple[int, ...], u_ND: Tensor, poles_DZ2: Tensor, first_SDZ2: Tensor | None = None
) -> Tensor:
    """Last states [S, D, Z, 2] of the reference, chunk by chunk; fp32 or wider."""
    u, poles = wide(u_ND), wide(poles_DZ2)
    chunks = plan(lengths, STATE_CHUNK, u.device)
    cells, held = chunks.spread(u), chunks.tokens(u.dtype).sum(1).long()
    # the last token of a chunk counts with pole^0: move a chunk that is not full to the right end
    place = torch.arange(chunks.size, device=u.device) - (chunks.size - held)[:, None]
    right = cells.gather(1, place.clamp(min=0).unsqueeze(-1).expand_as(cells)) * (place >= 0).unsqueeze(-1)
    back = powers(poles, torch.arange(chunks.size - 1, -1, -1, device=u.device))
    gain = [torch.einsum("mcd,cdz->mdz", right, part) for part in back]
    kept = powers(poles, held)

    def step(state: Tensor, part: slice) -> Tensor:
        moved = times(state.unbind(-1), (kept[0][part], kept[1][part]))  # type: ignore[arg-type]
        return torch.stack([moved[0] + gain[0][part], moved[1] + gain[1][part]], -1)

    if first_SDZ2 is None:
        first_SDZ2 = u.new_zeros(len(lengths), *poles.shape)
    return carry(chunks, first_SDZ2.to(u.dtype), step)[1]


def long_conv_step(
    u_SD: Tensor, poles_DZ2: Tensor, residues_DZ2: Tensor, state_SDZ2: Tensor
) -> tuple[Tensor, Tensor]:
    """One token per segment -> outputs [S, D] and states [S, D, Z, 2]: the recurrence itself."""
    poles, residues, state = wide(poles_DZ2), wide(residues_DZ2), wide(state_SDZ2)
    real, imaginary = times(state.unbind(-1), poles.unbind(-1))  # type: ignore[arg-type]
    real = real + wide(u_SD).unsqueeze(-1)
    y_SD = (residues[..., 0] * real - residues[..., 1] * imaginary).sum(-1)
    return y_SD, torch.stack([real, imaginary], -1)


def _fft_size(least: int) -> int:
    """The next length of the form 2^a, 3 2^a or 5 2^a, which FFTs are fast at."""
    sizes = [factor << max(0, (-(-least // factor) - 1).bit_length()) for factor in (1, 3, 5)]
    return min(sizes)


@functools.lru_cache(maxsize=16)
def _rows(lengths: tuple[int, ...], device: torch.device) -> tuple[tuple[tuple[int, int], ...], Tensor]:
    """(rows, width) of every bucket, and the place of every token in all rows laid end to end."""
    row_start, shapes, done = [0] * len(lengths), [], 0
    for bucket in buckets(lengths):
        for i, segment in enumerate(bucket.segments):
            row_start[segment] = done + i * bucket.width
        shapes.append((bucket.rows, bucket.width))
        done += bucket.rows * bucket.width
    length_S = torch.tensor(lengths, device=device)
    shift_S = torch.tensor(row_start, device=device) - (length_S.cumsum(0) - length_S)
    total = sum(lengths)
    shift_N = shift_S.repeat_interleave(length_S, output_size=total)
    return tuple(shapes), torch.arange(total, device=device) + shift_N
