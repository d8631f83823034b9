"""What each token of a step attends to: the `attend` the engine passes to the decoder.

Rows of one token (sequences that are being generated) are one small batched product over the lanes; the
others (prompts, chunks of prompts) go through padded calls, rows of like cost together. Layers that only
hide the future take torch's fused attention with as little mask as possible; windows, ALiBi, soft caps and
prefixes that see themselves go through the same calls with an explicit bias, in float32.

Shapes: N flat tokens of a step, R its rows, M single-token rows, P rows of a padded group, T its width, S
positions attended to, H query heads, K key/value heads, G = H / K, E key width, V value width, C capacity of
a lane, L lanes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from caravan.engine.lanes import Lanes, Pair
from caravan.engine.scheduler import Row
from caravan.kernels.attention import Pairs, alibi_slopes
from caravan.model.spec import Attn

_IDS = -1
"""The layer under whose number the lanes keep ids, for models with a learned bias for pairs of tokens."""
_GROUP_WASTE = 1.5
"""Chunks share one padded call while it costs at most this many times their own attention."""


@dataclass(frozen=True, slots=True)
class _Queries:
    """Rows that go through one attention call."""

    pos_PT: Tensor
    """Position of every query; padding repeats a row's last."""
    prefix_P: Tensor | None
    """Positions before this one see each other; None: only the past is seen."""
    ragged: bool
    """Whether anything is hidden from anybody among the keys asked for."""
    biases: dict[Any, Tensor | None] = field(default_factory=dict)

    def bias(
        self, attn: Attn, first: int, width: int, ring: int = 0, learned: Callable[[], Tensor] | None = None
    ) -> Tensor | None:
        """[P, 1 or H, T, S] what to add to the scores of keys first .. first + width - 1 (of a ring of so
        many positions, if it is one): ALiBi, what `learned` gives, and minus infinity where a key is hidden;
        None when that is nothing. Equal layers share it."""
        alibi = (attn.alibi_scale, attn.alibi_max, attn.n_head) if attn.alibi else None
        key = (attn.window, alibi, first, width, ring, learned is None)
        if key not in self.biases:
            bias = self._bias(attn, first, width, ring)
            if learned is not None:
                bias = learned() if bias is None else bias + learned()
            self.biases[key] = bias
        return self.biases[key]

    def rows(self, pairs: Pairs, ids_PS: Tensor) -> Tensor:
        """[P, H, T, S] of a learned bias; `ids_PS` are the texts' ids from their first position on."""
        known_PS = pairs.read(ids_PS)
        known_PT = known_PS.gather(1, self.pos_PT)
        back_PTS = torch.arange(ids_PS.shape[1], device=ids_PS.device) - self.pos_PT[:, :, None]
        row_PTS = pairs.row(back_PTS, known_PT[:, :, None], known_PS[:, None])
        bias_PTSH = F.embedding(row_PTS.clamp_min(0), pairs.table_XH.float())
        return bias_PTSH.permute(0, 3, 1, 2).masked_fill(row_PTS[:, None] < 0, float("-inf"))

    def _bias(self, attn: Attn, first: int, width: int, ring: int) -> Tensor | None:
        if not self.ragged and not attn.alibi and not ring:
            return None
        key_S = torch.arange(first, first + width, device=self.pos_PT.device)
        if ring:  # the newest position that lies there; below 0 where none does yet
            last_P1 = self.pos_PT[:, -1:]
            key_P1S = (last_P1 - (last_P1 - key_S) % ring).unsqueeze(1)
            back_PTS = self.pos_PT[:, :, None] - key_P1S
            hidden_PTS = (back_PTS < 0) | (key_P1S < 0)
        else:
            back_PTS = self.pos_PT[:, :, None] - key_S
            hidden_PTS = back_PTS < 0
        if attn.window is not None:
            hidden_PTS |= back_PTS >= attn.window
        if self.prefix_P is not None:
            end_P11 = self.prefix_P[:, None, None]
            hidden_PTS &= (key_S >= end_P11) | (self.pos_PT[:, :, None] >= end_P11)
        bias_PHTS = torch.zeros(back_PTS.shape, device=back_PTS.device).unsqueeze(1)
        if attn.alibi:
            slope_H = alibi_slopes(attn.n_head, attn.alibi_max).to(back_PTS.device) * attn.alibi_scale
            bias_PHTS = -slope_H[:, None, None] * back_PTS.unsqueeze(1)
        return bias_PHTS.masked_fill(hidden_PTS.unsqueeze(1), float("-inf"))


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Rows of several tokens that go through one padded call."""

    take_PT: Tensor
    """Flat token of every cell (padding repeats a real one)."""
    back: Tensor
    """Cells that are real, in order of `at`."""
    at: Tensor
    """Flat token of each real cell."""
    lane_P: Tensor | None
    """Lanes whose earlier positions matter; None when every row starts at 0."""
    seen: int
    """Positions attended to, padding included."""
    queries: _Queries


class StepAttention:
    """The `attend` of one step: stores keys, values and states, and attends over the lanes. Built once per
    plan.

    The rows with one token come first; `rows` must be so ordered. `prefixes` says for each row how many first
    tokens of its sequence see each other in both directions.
    """

    whole = False

    def __init__(
        self, lanes: Lanes, rows: Sequence[Row], device: torch.device, prefixes: Sequence[int] | None = None
    ) -> None:
        self.lanes = lanes
        self.device = device
        self.rows = rows
        self.starts = tuple(row.start for row in rows)
        """Position of each row's first token."""
        self.lengths = tuple(row.n for row in rows)
        self.prefix = None if prefixes is None else tuple(prefixes)
        self.routed: dict[int, tuple[Tensor, Tensor]] = {}
        self.singles = sum(row.n == 1 for row in rows)
        used = [lanes.lane_of[row.request.id] for row in rows]
        self.lane_R = torch.tensor(used, device=device)
        self.fresh_R = torch.tensor([row.start == 0 for row in rows], device=device)
        self.all_fresh = all(row.start == 0 for row in rows)
        self.lane_N = self.lane_R.repeat_interleave(torch.tensor(self.lengths, device=device))
        self.pos_N = torch.tensor([p for r in rows for p in range(r.start, r.start + r.n)], device=device)
        self._cells: dict[tuple[int, int], Tensor] = {}
        self._ids: Tensor | None = None
        if self.singles:
            pos_M = self.pos_N[: self.singles]
            self.dense = used[: self.singles] == list(range(self.singles))
            self.newest, self.oldest = int(pos_M.max()), int(pos_M.min())
            self.single = _Queries(pos_M[:, None], None, self.newest != self.oldest)
        self.chunks = _plan_chunks(rows, self.singles, lanes, device, self.prefix)

    def __call__(
        self, index: int, q_NHE: Tensor, k_NKE: Tensor, v_NKV: Tensor, attn: Attn, pairs: Pairs | None = None
    ) -> Tensor:
        """[N, H, E] queries, [N, K, E] keys and [N, K, V] values of this step's tokens -> [N, H, V]."""
        if pairs is not None and self._ids is None:
            self._ids = self._texts(pairs)
        pair = self.lanes.layer(index, k_NKE, v_NKV, attn.window)
        ring = pair[0].shape[2] if pair[0].shape[2] < self.lanes.capacity else 0
        self._write(pair, k_NKE, v_NKV)
        M = self.singles
        if not self.chunks:
            return self._attend_singles(pair, ring, q_NHE, attn, pairs)
        out_NHV = q_NHE.new_empty(*q_NHE.shape[:2], v_NKV.shape[-1])
        if M:
            out_NHV[:M] = self._attend_singles(pair, ring, q_NHE[:M], attn, pairs)
        for chunk in self.chunks:
            o = _attend_chunk(chunk, pair, ring, q_NHE, k_NKE, v_NKV, attn, self._learned(chunk, pairs))
            out_NHV[chunk.at] = o.to(q_NHE.dtype)
        return out_NHV

    def state(self, index: int) -> dict[str, Tensor] | None:
        """Recurrent state before each row, tensors [R, ...]; None when every row starts its sequence."""
        return None if self.all_fresh else self.lanes.state(index, self.lane_R, self.fresh_R)

    def keep(self, index: int, state: dict[str, Tensor]) -> None:
        """The state after each row goes into the row's lane."""
        self.lanes.keep(index, self.lane_R, state)

    def coarse(self, size: int) -> tuple[StepAttention | None, list[int]]:
        """The `attend` over patches of `size` tokens that end in this step, one position each, and the rows
        that have such patches, in the order in which it wants them. (None, []) when no patch ends."""
        ended = {}
        for at, row in enumerate(self.rows):
            start = row.start // size
            count = (row.start + row.n) // size - start
            if count:
                ended[at] = Row(row.request, start, count, sample=False)
        if not ended:
            return None, []
        lanes = self.lanes.coarse(size)
        lanes.reserve(max(row.start + row.n for row in ended.values()))
        order = sorted(ended, key=lambda at: (ended[at].n > 1, lanes.lane_of[ended[at].request.id]))
        return StepAttention(lanes, [ended[at] for at in order], self.device), order

    def _texts(self, pairs: Pairs) -> Tensor:
        """[L, C] ids of every lane's text so far. They lie beside the keys, as one more layer's (float32 is
        exact for them), so that they move and are shared with them."""
        assert pairs.ordered, "who sees whom must follow from the order of the text"
        ids_N11 = pairs.ids_N.view(-1, 1, 1).float()
        pair = self.lanes.layer(_IDS, ids_N11, ids_N11)
        self._write(pair, ids_N11, ids_N11)
        return pair[0][:, 0, :, 0]

    def _learned(self, chunk: _Chunks, pairs: Pairs | None) -> Callable[[], Tensor] | None:
        """What gives the learned bias of a chunk's rows."""
        if pairs is None or self._ids is None:
            return None
        if chunk.lane_P is None:
            ids_PS = pairs.ids_N[chunk.take_PT]
        else:
            ids_PS = self._ids[:, : chunk.seen].index_select(0, chunk.lane_P).long()
        return functools.partial(chunk.queries.rows, pairs, ids_PS)

    def _write(self, pair: Pair, k_NKE: Tensor, v_NKV: Tensor) -> None:
        _, K, C, _ = pair[0].shape
        cells = self._cells.get((K, C))
        if cells is None:
            head_K = torch.arange(K, device=self.device)
            cells = ((self.lane_N[:, None] * K + head_K) * C + self.pos_N[:, None] % C).flatten()
            self._cells[K, C] = cells
        for kept, new in zip(pair, (k_NKE, v_NKV), strict=True):
            kept.flatten(0, 2).index_copy_(0, cells, new.to(kept.dtype).flatten(0, 1))

    def _attend_singles(
        self, pair: Pair, ring: int, q_MHE: Tensor, attn: Attn, pairs: Pairs | None
    ) -> Tensor:
        """One query per sequence: the G heads that share keys are the rows of one small product."""
        M, H, E = q_MHE.shape
        K = pair[0].shape[1]
        first = 0 if attn.window is None or ring else max(0, self.oldest - attn.window + 1)
        end = min(self.newest + 1, pair[0].shape[2])
        if self.dense:
            k, v = (kept[:M, :, first:end] for kept in pair)
        else:
            k, v = (kept[:, :, first:end].index_select(0, self.lane_R[:M]) for kept in pair)
        learned = None
        if pairs is not None and self._ids is not None:
            ids_MS = self._ids[:, :end].index_select(0, self.lane_R[:M]).long()
            learned = functools.partial(self.single.rows, pairs, ids_MS)
        bias = self.single.bias(attn, first, end - first, ring, learned)
        if bias is not None and bias.shape[1] == H:
            bias = bias.view(M, K, H // K, -1)
        o = _product(q_MHE.reshape(M, K, H // K, E).to(k.dtype), k, v, bias, attn)
        return o.reshape(M, H, -1).to(q_MHE.dtype)


def _attend_chunk(
    chunk: _Chunks, pair: Pair, ring: int, q_NHE: Tensor, k_NKE: Tensor, v_NKV: Tensor, attn: Attn,
    learned: Callable[[], Tensor] | None,
) -> Tensor:  # fmt: skip
    """Several queries per sequence, padded to one width -> [real cells, H, V]."""
    q = q_NHE[chunk.take_PT].transpose(1, 2)  # [P, H, T, E]
    shaped = attn.window is not None or attn.alibi or attn.softcap is not None
    if chunk.lane_P is None:
        k, v = (x[chunk.take_PT].transpose(1, 2) for x in (k_NKE, v_NKV))
        if not shaped and learned is None and chunk.queries.prefix_P is None:
            gqa = q_NHE.shape[1] != k_NKE.shape[1]
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attn.scale, enable_gqa=gqa)
            return o.transpose(1, 2).flatten(0, 1)[chunk.back]
        q, k, v = q.float(), k.float(), v.float()
        bias = chunk.queries.bias(attn, 0, chunk.seen, learned=learned)
    else:
        k, v = (kept[:, :, : chunk.seen].index_select(0, chunk.lane_P) for kept in pair)
        q = q.to(k.dtype)
        bias = chunk.queries.bias(attn, 0, k.shape[2], ring, learned)
    o = _product(q, k, v, bias, attn)
    return o.transpose(1, 2).flatten(0, 1)[chunk.back]


def _product(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, attn: Attn) -> Tensor:
    """softmax(shaped scores + bias) v. [P, H, T, E] queries on [P, K, S, E] keys, [P, K, S, V] values."""
    gqa = q.shape[1] != k.shape[1]
    if bias is not None:
        bias = bias.to(q.dtype)
    if attn.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attn.scale, enable_gqa=gqa)
    if gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2)
    scores = scores.mul_(attn.scale / attn.softcap).tanh_().mul_(attn.softcap)
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def _plan_chunks(
    rows: Sequence[Row], singles: int, lanes: Lanes, device: torch.device, prefix: Sequence[int] | None
) -> list[_Chunks]:
    """Group the rows of several tokens, of like cost, into padded calls."""
    first = [0]
    for row in rows:
        first.append(first[-1] + row.n)
    many = range(singles, len(rows))
    order = sorted(many, key=lambda i: (rows[i].start > 0, rows[i].start + rows[i].n, rows[i].n))
    groups: list[list[int]] = []
    real = 0
    for i in order:
        cost = rows[i].n * (rows[i].start + rows[i].n)
        if groups and (rows[groups[-1][0]].start > 0) == (rows[i].start > 0):
            members = [*groups[-1], i]
            width = max(rows[j].n for j in members)
            seen = max(rows[j].start + rows[j].n for j in members)
            if width * seen * len(members) <= _GROUP_WASTE * (real + cost):
                groups[-1].append(i)
                real += cost
                continue
        groups.append([i])
        real = cost
    return [
        _chunk(
            [rows[i] for i in group],
            [first[i] for i in group],
            None if prefix is None else [prefix[i] for i in group],
            lanes,
            device,
        )
        for group in groups
    ]


def _chunk(
    rows: list[Row], begins: list[int], prefix: list[int] | None, lanes: Lanes, device: torch.device
) -> _Chunks:
    n_P1 = torch.tensor([row.n for row in rows])[:, None]
    step_1T = torch.arange(int(n_P1.max()))[None]
    inside_PT = torch.minimum(step_1T, n_P1 - 1)
    take_PT = torch.tensor(begins)[:, None] + inside_PT
    pos_PT = torch.tensor([row.start for row in rows])[:, None] + inside_PT
    back = (step_1T < n_P1).flatten().nonzero().squeeze(1)
    lane_P = None
    if rows[0].start > 0:
        lane_P = torch.tensor([lanes.lane_of[row.request.id] for row in rows], device=device)
    prefix_P = torch.tensor(prefix, device=device) if prefix is not None and any(prefix) else None
    at = take_PT.flatten()[back]
    return _Chunks(
        take_PT.to(device),
        back.to(device),
        at.to(device),
        lane_P,
        int(pos_PT.max()) + 1,
        _Queries(pos_PT.to(device), prefix_P, True),
    )
