"""Causal attention inside each segment of a flat batch: the `attend` that training passes to the decoder.

N flat tokens, S segments, B rows of one bucket, T time within a row, H query heads, K key/value heads, E head width.

Segments of like length are laid side by side in a bucket, padded on the right to its longest, and go through one
causal call: right padding is invisible to causal queries, and what the padded queries compute is thrown away. When
all segments are equally long (packed pre-training rows) the bucket is a view of the flat batch and nothing is moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PAD_LIMIT = 1.25
"""A bucket may hold this many times its real tokens; beyond it, another bucket is cheaper."""


def reference_attention(lengths: Sequence[int], q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, scale: float) -> Tensor:
    """The definition: one segment, one head at a time, scores and softmax in fp32 or wider."""
    group = q_NHE.shape[1] // k_NKE.shape[1]
    wide = torch.promote_types(q_NHE.dtype, torch.float32)
    rows, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        start += length
        heads = []
        for h in range(q_NHE.shape[1]):
            q, k, v = q_NHE[part, h].to(wide), k_NKE[part, h // group].to(wide), v_NKE[part, h // group].to(wide)
            scores = q @ k.T * scale
            hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
            heads.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v)
        rows.append(torch.stack(heads, 1))
    return torch.cat(rows).to(q_NHE.dtype)


@dataclass(frozen=True, slots=True)
class Bucket:
    """B segments that go through one call of width T."""

    rows: int
    width: int
    take: Tensor | None
    """[B * T] flat token of every cell (padding repeats a real one); None: the flat batch as it stands."""
    back: Tensor | None
    """[tokens of the bucket] cell of every real token, in the order of `at`."""
    at: Tensor | None
    """[tokens of the bucket] flat token of each entry of `back`."""


def buckets(lengths: Sequence[int], device: torch.device | str = "cpu") -> list[Bucket]:
    """Group segments so that padding stays below PAD_LIMIT; zero-length segments are skipped."""
    if not lengths:
        return []
    if len(set(lengths)) == 1:
        return [Bucket(len(lengths), lengths[0], None, None, None)] if lengths[0] else []
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    order = sorted((s for s, n in enumerate(lengths) if n), key=lambda s: -lengths[s])
    groups: list[list[int]] = []
    real = 0
    for s in order:
        if groups:
            width = lengths[groups[-1][0]]
            if width * (len(groups[-1]) + 1) <= PAD_LIMIT * (real + lengths[s]):
                groups[-1].append(s)
                real += lengths[s]
                continue
        groups.append([s])
        real = lengths[s]
    return [_bucket(group, starts, lengths, device) for group in groups]


def _bucket(group: list[int], starts: list[int], lengths: Sequence[int], device: torch.device | str) -> Bucket:
    width = lengths[group[0]]
    begin_B1 = torch.tensor([starts[s] for s in group])[:, None]
    length_B1 = torch.tensor([lengths[s] for s in group])[:, None]
    step_1T = torch.arange(width)[None]
    take_BT = begin_B1 + torch.minimum(step_1T, length_B1 - 1)
    real_BT = step_1T < length_B1
    back = real_BT.flatten().nonzero().squeeze(1)
    take = take_BT.flatten()
    return Bucket(len(group), width, take.to(device), back.to(device), take[back].to(device))


class Segments:
    """`attend` for a flat batch of segments: built once per batch, called once per layer.

    Gradients are exact and no token sees another segment. `lengths` are python integers whose sum is N.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.lengths = tuple(lengths)
        self.tokens = sum(self.lengths)
        self.buckets = buckets(self.lengths, device)

    def __call__(self, layer: int, q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, scale: float) -> Tensor:
        """[N, H, E] queries against [N, K, E] keys and values -> [N, H, E]. The layer index is not needed here."""
        assert q_NHE.shape[0] == self.tokens, (q_NHE.shape, self.tokens)
        if len(self.buckets) == 1 and self.buckets[0].take is None:
            return _rows(self.buckets[0], q_NHE, k_NKE, v_NKE, scale).reshape(q_NHE.shape)
        parts, places = [], []
        for bucket in self.buckets:
            assert bucket.take is not None and bucket.back is not None and bucket.at is not None
            q, k, v = (x.index_select(0, bucket.take) for x in (q_NHE, k_NKE, v_NKE))
            parts.append(_rows(bucket, q, k, v, scale).index_select(0, bucket.back))
            places.append(bucket.at)
        return torch.empty_like(q_NHE).index_copy(0, torch.cat(places), torch.cat(parts))


def _rows(bucket: Bucket, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B*T, H, E] -> [B*T, H, E]: one causal call for the whole bucket."""
    q, k, v = (x.view(bucket.rows, bucket.width, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2).flatten(0, 1)
