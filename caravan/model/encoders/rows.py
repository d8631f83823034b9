"""Flat segments as dense rows, without padding: segments of equal length side by side.

Attention with an additive bias needs a [queries, keys] grid. Segments of one length share one grid, so that
no row ever holds a padding cell, and a batch of equal lengths is a plain reshape.

N flat tokens, G groups of equal shape, B rows of a group, T tokens of a row, H heads, E head width.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Rows:
    """Which tokens make up the rows of each group.

    `groups[g]` lists the segments of group g. Segments fall into one group when their length is the same,
    or, where `keys` gives one key per segment, when length and key are.
    """

    def __init__(
        self, lengths: Sequence[int], device: torch.device, keys: Sequence[Hashable] | None = None
    ) -> None:
        found: dict[Hashable, list[int]] = {}
        starts = [0]
        for s, length in enumerate(lengths):
            starts.append(starts[-1] + length)
            if length:
                found.setdefault((length, None if keys is None else keys[s]), []).append(s)
        self.groups = list(found.values())
        self.lengths = [lengths[group[0]] for group in self.groups]
        order = [t for group in self.groups for s in group for t in range(starts[s], starts[s + 1])]
        self._plain = order == list(range(starts[-1]))
        back = [0] * len(order)
        for cell, token in enumerate(order):
            back[token] = cell
        self._order_N, self._back_N = (
            torch.tensor(x, dtype=torch.int64, device=device) for x in (order, back)
        )

    def split(self, x_N: Tensor) -> list[Tensor]:
        """[N, ...] -> one [B, T, ...] per group."""
        x_N = x_N if self._plain else x_N.index_select(0, self._order_N)
        sizes = [len(group) * length for group, length in zip(self.groups, self.lengths, strict=True)]
        parts = x_N.split(sizes)
        return [part.view(len(g), -1, *x_N.shape[1:]) for part, g in zip(parts, self.groups, strict=True)]

    def join(self, rows: Sequence[Tensor]) -> Tensor:
        """One [B, T, ...] per group -> [N, ...]."""
        x_N = torch.cat([row.flatten(0, 1) for row in rows])
        return x_N if self._plain else x_N.index_select(0, self._back_N)


def attention(q_BTHE: Tensor, k_BTHE: Tensor, v_BTHE: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k + bias) v over one group of rows; bias broadcasts to [B, H, queries, keys].

    -> [B, queries, H, E].
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTHE, v_BTHE))
    bias = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2)


def relative(queries: int, keys: int, device: torch.device, start: int = 0) -> Tensor:
    """[queries, keys] key position minus query position; the first query stands at `start`."""
    return torch.arange(keys, device=device) - torch.arange(start, start + queries, device=device)[:, None]


def t5_buckets(distance: Tensor, buckets: int, max_distance: int, both: bool) -> Tensor:
    """Bucket of a distance (key minus query): near ones exactly, far ones in logarithmic steps up to
    max_distance (Raffel et al. 2020, arXiv:1910.10683, section 2.1).

    `both` directions share the buckets half and half; otherwise keys to the right fall into bucket 0.
    """
    side = torch.zeros_like(distance)
    if both:
        buckets //= 2
        side = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp_min(0)
    exact = buckets // 2
    # the argument of the logarithm is kept at or above 1; nearer distances do not use it
    far = torch.log(distance.clamp_min(exact).float() / exact) / math.log(max_distance / exact)
    far = exact + (far * (buckets - exact)).long()
    return side + torch.where(distance < exact, distance, far.clamp_max(buckets - 1))
