"""Short causal filters over time: the depthwise convolution before a state space, and RWKV's token shift.

N flat tokens, S segments, D channels, K taps.

What lies before a segment is its state (the last K - 1 inputs, oldest first) or nothing, that is zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_short_conv(
    lengths: Sequence[int], x_ND: Tensor, weight_DK: Tensor, bias_D: Tensor | None, before_SDK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y_t = sum_k weight_k x_{t-K+1+k} + bias, one segment at a time; also the state after it."""
    outputs, after, start = [], [], 0
    taps = weight_DK.shape[1]
    for s, length in enumerate(lengths):
        past = x_ND.new_zeros(taps - 1, x_ND.shape[1]) if before_SDK is None else before_SDK[s].T
        row = torch.cat([past, x_ND[start : start + length]])
        start += length
        for t in range(length):
            y_D = (row[t : t + taps] * weight_DK.T).sum(0)
            outputs.append(y_D if bias_D is None else y_D + bias_D)
        after.append(row[len(row) - taps + 1 :].T)
    return torch.stack(outputs), torch.stack(after)


@functools.lru_cache(maxsize=16)
def _places(lengths: tuple[int, ...], taps: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where tokens [N] and pasts [S * (K-1)] lie in a row of segments with room before each, and the
    places of the states after them [S * (K-1)]."""
    length_S = torch.tensor(lengths, device=device)
    total, room = sum(lengths), taps - 1
    segment_N = torch.arange(len(lengths), device=device).repeat_interleave(length_S, output_size=total)
    token_N = torch.arange(total, device=device) + (segment_N + 1) * room
    end_S = length_S.cumsum(0) + torch.arange(1, len(lengths) + 1, device=device) * room
    offset_K = torch.arange(room, device=device)
    past = (end_S - length_S - room)[:, None] + offset_K
    return token_N, past.flatten(), ((end_S - room)[:, None] + offset_K).flatten()


def short_conv(
    lengths: tuple[int, ...],
    x_ND: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    before_SDK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Same as the reference as one convolution: [N, D] outputs and [S, D, K-1] states, x's dtype."""
    d, taps = weight_DK.shape
    token_N, past, after = _places(lengths, taps, x_ND.device)
    row = x_ND.new_zeros(x_ND.shape[0] + len(past), d).index_copy(0, token_N, x_ND)
    if before_SDK is not None:
        row = row.index_copy(0, past, before_SDK.transpose(1, 2).flatten(0, 1).to(x_ND.dtype))
    y = F.conv1d(row.T[None], weight_DK.unsqueeze(1), bias_D, groups=d)[0].T
    state = row.index_select(0, after).view(len(lengths), taps - 1, d).transpose(1, 2)
    return y.index_select(0, token_N - (taps - 1)), state


@functools.lru_cache(maxsize=16)
def _starts(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    length_S = torch.tensor(lengths, device=device)
    end_S = length_S.cumsum(0)
    return end_S - length_S, end_S - 1


def token_shift(lengths: tuple[int, ...], x_ND: Tensor, before_SD: Tensor | None) -> tuple[Tensor, Tensor]:
    """The token before every token [N, D] (the state, or zero, at the start of a segment), and the last
    token of every segment [S, D]."""
    start_S, last_S = _starts(lengths, x_ND.device)
    previous = torch.cat([torch.zeros_like(x_ND[:1]), x_ND[:-1]])
    if before_SD is None:
        first = torch.zeros(len(lengths), x_ND.shape[1], dtype=x_ND.dtype, device=x_ND.device)
    else:
        first = before_SD.to(x_ND.dtype)
    return previous.index_copy(0, start_S, first), x_ND.index_select(0, last_S)
