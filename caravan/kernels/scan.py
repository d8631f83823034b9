"""The state-space recurrences of Mamba, in chunks, beside the loops that define them.

N flat tokens, S segments, D inner width, H heads, P head width, G groups, Z state size; M chunks of C tokens
(kernels/chunks.py). Everything is computed in fp32 or wider.

Mamba-1 (Gu & Dao 2023, arXiv:2312.00752, eq. 2 with the discretisation of section 3.1):
    h_t[d,z] = exp(dt_t[d] A[d,z]) h_{t-1}[d,z] + dt_t[d] B_t[z] x_t[d],    y_t[d] = sum_z C_t[z] h_t[d,z]
Every pair (d, z) decays at its own speed, so chunks run an associative scan, and only the states between
chunks are kept for the backward pass.

Mamba-2 (Dao & Gu 2024, arXiv:2405.21060, section 6): one decay per head, so that a chunk is a matrix product
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t',    y_t = h_t C_t
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from caravan.kernels.chunks import Chunks, carry, plan, wide

SELECTIVE_CHUNK = 32
"""Tokens per chunk of Mamba-1: the work area is segments x 32 x D x Z numbers."""
SSD_CHUNK = 64
"""Tokens per chunk of Mamba-2, where a larger chunk means more scores and fewer states."""


def reference_selective_scan(
    lengths: Sequence[int],
    x_ND: Tensor, dt_ND: Tensor, A_DZ: Tensor, B_NZ: Tensor, C_NZ: Tensor,
    first_SDZ: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, token by token -> outputs [N, D] and last states [S, D, Z]."""
    outputs, last, t = [], [], 0
    for s, length in enumerate(lengths):
        h_DZ = torch.zeros_like(A_DZ) if first_SDZ is None else first_SDZ[s]
        for t in range(t, t + length):  # noqa: B020 (continues where the last segment ended)
            h_DZ = torch.exp(dt_ND[t, :, None] * A_DZ) * h_DZ
            h_DZ = h_DZ + (dt_ND[t] * x_ND[t])[:, None] * B_NZ[t]
            outputs.append(h_DZ @ C_NZ[t])
        t += 1
        last.append(h_DZ)
    return torch.stack(outputs), torch.stack(last)


def selective_scan(
    lengths: tuple[int, ...],
    x_ND: Tensor, dt_ND: Tensor, A_DZ: Tensor, B_NZ: Tensor, C_NZ: Tensor,
    first_SDZ: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same as the reference, parallel within and among chunks; fp32 or wider."""
    chunks = plan(lengths, SELECTIVE_CHUNK, x_ND.device)
    if first_SDZ is None:
        first_SDZ = wide(x_ND).new_zeros(len(lengths), *A_DZ.shape)
    cells = [chunks.spread(wide(t)) for t in (x_ND, dt_ND, B_NZ, C_NZ)]
    y, last = SelectiveScan.apply(chunks, *cells[:2], wide(A_DZ), *cells[2:], first_SDZ)
    return chunks.collect(y), last


def associative_scan_(decay: Tensor, h: Tensor) -> Tensor:
    """h_t <- decay_t h_{t-1} + h_t along axis 1 (a power of two long), in place; `decay` is spoilt.

    Brent & Kung's tree (1982): up and down in log2 steps, and less than two multiply-adds per element.
    """
    length, span = h.shape[1], 1
    while span < length:
        left, right = slice(span - 1, None, 2 * span), slice(2 * span - 1, None, 2 * span)
        h[:, right].addcmul_(decay[:, right], h[:, left])
        decay[:, right].mul_(decay[:, left])
        span *= 2
    span //= 4
    while span >= 1:
        source = slice(2 * span - 1, length - span, 2 * span)
        target = slice(3 * span - 1, None, 2 * span)
        h[:, target].addcmul_(decay[:, target], h[:, source])
        span //= 2
    return h


class SelectiveScan(torch.autograd.Function):
    """Mamba-1 on chunks [M, C, .]; keeps the state before every chunk and computes the others again.

    Backward: with g_t = C_t dy_t + a_{t+1} g_{t+1}, a_t = exp(dt_t A), the same scan backwards,
    dC_t = sum_D h_t dy_t, dB_t = sum_D g_t dt_t x_t, d(dt x)_t = sum_Z g_t B_t, d(dt A)_t = g_t h_{t-1} a_t.
    """

    @staticmethod
    def forward(
        ctx: Any, chunks: Chunks, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(x)

        def step(state: Tensor, part: slice) -> Tensor:
            h = _states(x[part], dt[part], A, B[part], state)[1]
            y[part] = (h @ C[part].unsqueeze(-1)).squeeze(-1)
            return h[:, -1].clone()

        before, last = carry(chunks, first, step)
        ctx.chunks = chunks
        ctx.save_for_backward(x, dt, A, B, C, before)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, before = ctx.saved_tensors
        dx, ddt, dB, dC = (torch.empty_like(t) for t in (x, dt, B, C))
        dA = torch.zeros_like(A)
        dlast = dlast.index_select(0, ctx.chunks.order_S)
        carried = dlast[:0]
        for alive, part in reversed(list(ctx.chunks.steps())):
            carried = torch.cat([carried, dlast[carried.shape[0] : alive]])
            decay, h = _states(x[part], dt[part], A, B[part], before[part])
            g = dy[part].unsqueeze(-1) * C[part].unsqueeze(2)
            g[:, -1] += carried
            later = torch.cat([decay[:, 1:], torch.ones_like(decay[:, :1])], 1)
            g = associative_scan_(later.flip(1), g.flip(1)).flip(1)
            dC[part] = (dy[part].unsqueeze(2) @ h).squeeze(2)
            u = dt[part] * x[part]
            dB[part] = (u.unsqueeze(2) @ g).squeeze(2)
            du = (g @ B[part].unsqueeze(-1)).squeeze(-1)
            dx[part] = du * dt[part]
            carried = decay[:, 0] * g[:, 0]
            exponent = g.mul_(decay)
            exponent[:, 0] *= before[part]
            exponent[:, 1:] *= h[:, :-1]
            ddt[part] = du * x[part] + (exponent * A).sum(-1)
            dA += (exponent * dt[part].unsqueeze(-1)).sum((0, 1))
        return None, dx, ddt, dA, dB, dC, carried.index_select(0, ctx.chunks.rank_S)


def _states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states [m, C, D, Z] of m chunks that start from `state` [m, D, Z]."""
    decay = torch.exp(dt.unsqueeze(-1) * A)
    h = (dt * x).unsqueeze(-1) * B.unsqueeze(2)
    h[:, 0] += decay[:, 0] * state
    return decay, associative_scan_(decay.clone(), h)


def reference_ssd(
    lengths: Sequence[int],
    x_NHP: Tensor, dt_NH: Tensor, A_H: Tensor, B_NGZ: Tensor, C_NGZ: Tensor,
    first_SHPZ: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, token by token -> outputs [N, H, P] and last states [S, H, P, Z]."""
    _, heads, width = x_NHP.shape
    B_NHZ, C_NHZ = (t.repeat_interleave(heads // t.shape[1], 1) for t in (B_NGZ, C_NGZ))
    outputs, last, t = [], [], 0
    for s, length in enumerate(lengths):
        h = x_NHP.new_zeros(heads, width, B_NGZ.shape[-1]) if first_SHPZ is None else first_SHPZ[s]
        for t in range(t, t + length):  # noqa: B020 (continues where the last segment ended)
            h = torch.exp(dt_NH[t] * A_H)[:, None, None] * h
            h = h + (dt_NH[t, :, None] * x_NHP[t])[:, :, None] * B_NHZ[t][:, None]
            outputs.append((h * C_NHZ[t][:, None]).sum(-1))
        t += 1
        last.append(h)
    return torch.stack(outputs), torch.stack(last)


def ssd(
    lengths: tuple[int, ...],
    x_NHP: Tensor, dt_NH: Tensor, A_H: Tensor, B_NGZ: Tensor, C_NGZ: Tensor,
    first_SHPZ: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same as the reference by the block decomposition of the paper (section 6); fp32 or wider.

    Only differences of sums of log-decays are exponentiated, never one against the order of time, so
    nothing overflows however fast a head forgets.
    """
    chunks = plan(lengths, SSD_CHUNK, x_NHP.device)
    heads, width, groups = x_NHP.shape[1], x_NHP.shape[2], B_NGZ.shape[1]
    x, dt, B, C = (chunks.spread(wide(t)).transpose(1, 2) for t in (x_NHP, dt_NH.unsqueeze(-1), B_NGZ, C_NGZ))
    if first_SHPZ is None:
        first_SHPZ = x.new_zeros(len(lengths), heads, width, B.shape[3])
    total = (dt.squeeze(-1) * wide(A_H)[:, None]).cumsum(-1)  # [M, H, C] log-decay since the chunk began
    later = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=x.device).triu(1)
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()
    scores = (C @ B.transpose(-1, -2)).repeat_interleave(heads // groups, 1) * decay
    xdt = x * dt

    # the heads of a group share B and C: fold them into the width instead of copying B and C
    fade = xdt * (total[..., -1:] - total).exp().unsqueeze(-1)
    fade = fade.transpose(-1, -2).reshape(-1, groups, heads // groups * width, chunks.size)
    gain = (fade @ B).view(-1, heads, width, B.shape[3])
    kept = total[..., -1].exp()[..., None, None]
    before, last = carry(chunks, first_SHPZ, lambda state, part: state * kept[part] + gain[part])
    past = before.view(-1, groups, heads // groups * width, B.shape[3]) @ C.transpose(-1, -2)
    past = past.view(-1, heads, width, chunks.size).transpose(-1, -2)
    y = scores @ xdt + past * total.exp().unsqueeze(-1)
    return chunks.collect(y.transpose(1, 2)), last
