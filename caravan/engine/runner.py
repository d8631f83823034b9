"""Runs one plan through the decoder: where keys and values lie, and what each token attends to.

Keys and values of running sequences lie in *lanes*, one contiguous row of positions per sequence, so that
decoding is one batched attention call over a view and nothing is gathered (on a CPU the gather of a paged
cache costs more than the attention). Published blocks are copied once into the *pool*, from which any later
sequence with the same prefix copies them into its own lane. Lanes are kept dense: a sequence that ends gives
its place to the last one.

On a CPU lanes are float32 whatever the model's type: one-token attention over a bfloat16 cache measured 2 to
5 times slower (torch 2.13, AVX512 with bf16 units). Values of a bfloat16 model are kept exactly.

Shapes: N flat tokens of a step, M single-token rows, P rows of a padded group, T its width, S positions
attended to, H query heads, K key/value heads, G = H / K, E head width, C capacity of a lane, L lanes, X
blocks, Z block size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from caravan.engine.scheduler import Plan, Request, Row
from caravan.model.decoder import Decoder
from caravan.model.spec import Attn

_GROUP_WASTE = 1.5
"""Chunks share one padded call while it costs at most this many times their own attention."""


class Lanes:
    """Key/value storage of all layers; a layer's tensors are made when it is first seen."""

    def __init__(self, lanes: int, blocks: int, block_size: int, max_context: int) -> None:
        self.count, self.blocks, self.block_size = lanes, blocks, block_size
        self.rows = 1  # lanes that have memory; one long chat must not pay for sixteen
        self.limit = -(-max_context // block_size) * block_size
        self.capacity = min(self.limit, max(64, 4 * block_size) // block_size * block_size)
        self.kv: dict[int, Tensor] = {}  # layer -> [2, L, K, C, E]
        self.pool: dict[int, Tensor] = {}  # layer -> [X, 2, K, Z, E]
        self.order: list[int] = []  # request id of each lane in use
        self.lane_of: dict[int, int] = {}

    def open(self, request_id: int) -> int:
        """A lane for a request that starts."""
        lane = len(self.order)
        assert lane < self.count, "more running requests than lanes"
        self.order.append(request_id)
        self.lane_of[request_id] = lane
        return lane

    def close(self, request_id: int) -> None:
        """Give the lane back; the last one moves into the gap."""
        lane = self.lane_of.pop(request_id, None)
        if lane is None:
            return
        last = len(self.order) - 1
        if lane != last:
            for kv in self.kv.values():
                kv[:, lane] = kv[:, last]
            moved = self.order[last]
            self.order[lane] = moved
            self.lane_of[moved] = lane
        self.order.pop()

    def reserve(self, positions: int) -> None:
        """Make every lane in use `positions` long or longer. What grows doubles at least: growth is rare."""
        used = len(self.order)
        if positions <= self.capacity and used <= self.rows:
            return
        size = self.block_size
        if positions > self.capacity:
            self.capacity = min(self.limit, -(-max(positions, 2 * self.capacity) // size) * size)
        if used > self.rows:
            self.rows = min(self.count, max(used, 2 * self.rows))
        for layer, old in self.kv.items():
            _, rows, K, capacity, E = old.shape
            self.kv[layer] = old.new_zeros(2, self.rows, K, self.capacity, E)
            self.kv[layer][:, :rows, :, :capacity] = old

    def layer(self, layer: int, k_NKE: Tensor) -> Tensor:
        """[2, L, K, C, E] of a layer, zero where never written (a masked value must still be a number)."""
        kv = self.kv.get(layer)
        if kv is None:
            _, K, E = k_NKE.shape
            dtype = torch.float32 if k_NKE.device.type == "cpu" else k_NKE.dtype
            kv = k_NKE.new_zeros(2, self.rows, K, self.capacity, E, dtype=dtype)
            self.kv[layer] = kv
            self.pool[layer] = k_NKE.new_empty(self.blocks, 2, K, self.block_size, E, dtype=dtype)
        return kv

    def store(self, items: Sequence[tuple[Request, int, int]]) -> None:
        """Copy blocks that became shareable, (request, block of the sequence, block id), into the pool."""
        self._copy([(self.lane_of[r.id], i, block) for r, i, block in items], to_pool=True)

    def restore(self, requests: Sequence[Request]) -> None:
        """Copy the cached prefix of requests that start into their lanes."""
        size = self.block_size
        self._copy(
            [
                (self.lane_of[r.id], i, block)
                for r in requests
                for i, block in enumerate(r.blocks[: r.cached // size])
            ],
            to_pool=False,
        )

    def _copy(self, items: Sequence[tuple[int, int, int]], to_pool: bool) -> None:
        if not items:
            return
        for layer, kv in self.kv.items():
            lane, index, block = (torch.tensor(c, device=kv.device) for c in zip(*items, strict=True))
            cells = kv.unflatten(3, (-1, self.block_size))  # [2, L, K, C/Z, Z, E]
            pool = self.pool[layer]
            if to_pool:
                pool[block] = cells[:, lane, :, index]
            else:
                cells[:, lane, :, index] = pool[block]


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Rows of several tokens that go through one padded attention call."""

    take_PT: Tensor
    """Flat token of every cell (padding repeats a real one)."""
    back: Tensor
    """Cells that are real, in order of `at`."""
    at: Tensor
    """Flat token of each real cell."""
    lanes: Tensor | None
    """[P] lanes whose earlier positions matter; None when every row starts at 0."""
    visible_PTS: Tensor | None
    """[P, 1, T, S] which positions each token sees, beside `lanes`."""


class StepAttention:
    """The `attend` of one step: stores keys and values, then attends over the lanes. Built once per plan.

    The first `singles` flat tokens are the rows with one token; the others come in chunks.
    """

    def __init__(self, lanes: Lanes, rows: Sequence[Row], device: torch.device) -> None:
        self.lanes = lanes
        self.device = device
        self.lengths = tuple(row.n for row in rows)
        self.prefix: tuple[int, ...] | None = None
        self.routed: dict[int, tuple[Tensor, Tensor]] = {}
        single = [row for row in rows if row.n == 1]
        self.singles = len(single)
        self.lane_N = torch.tensor(
            [lane for row in rows for lane in [lanes.lane_of[row.request.id]] * row.n], device=device
        )
        self.pos_N = torch.tensor([p for r in rows for p in range(r.start, r.start + r.n)], device=device)
        self._cells: dict[int, Tensor] = {}
        if single:
            self._plan_singles([lanes.lane_of[row.request.id] for row in single])
        self.chunks = _plan_chunks(rows[self.singles :], self.singles, lanes, device)

    def _plan_singles(self, used: list[int]) -> None:
        pos_M = self.pos_N[: self.singles]
        longest = int(pos_M.max()) + 1
        dense = used == list(range(self.singles))
        self.single_lanes = None if dense else torch.tensor(used, device=self.device)
        self.width = longest
        hidden_MS = torch.arange(longest, device=self.device) > pos_M.unsqueeze(1)
        bias_MS = torch.zeros(hidden_MS.shape, device=self.device).masked_fill_(hidden_MS, float("-inf"))
        ragged = bool(hidden_MS.any())
        self.bias_M11S = bias_MS[:, None, None] if ragged else None

    def __call__(self, layer: int, q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, attn: Attn) -> Tensor:
        """[N, H, E] queries, [N, K, E] keys and values of this step's tokens -> [N, H, E]."""
        scale = attn.scale
        kv = self.lanes.layer(layer, k_NKE)
        self._write(kv, k_NKE, v_NKE)
        M = self.singles
        out_NHE = torch.empty_like(q_NHE) if self.chunks else q_NHE
        if M:
            o = self._attend_singles(kv, q_NHE[:M], scale)
            if not self.chunks:
                return o
            out_NHE[:M] = o
        for chunk in self.chunks:
            o = _attend_chunk(chunk, kv, q_NHE, k_NKE, v_NKE, scale)
            out_NHE[chunk.at] = o.to(q_NHE.dtype)
        return out_NHE

    def state(self, index: int) -> dict[str, Tensor] | None:
        raise NotImplementedError("generation with recurrent layers")

    def keep(self, index: int, state: dict[str, Tensor]) -> None:
        raise NotImplementedError("generation with recurrent layers")

    def _write(self, kv: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> None:
        _, _, K, C, _ = kv.shape
        cells = self._cells.get(K)
        if cells is None:
            head_K = torch.arange(K, device=self.device)
            cells = ((self.lane_N[:, None] * K + head_K) * C + self.pos_N[:, None]).flatten()
            self._cells[K] = cells
        for rows, new_NKE in zip(kv.flatten(1, 3).unbind(), (k_NKE, v_NKE), strict=True):
            rows.index_copy_(0, cells, new_NKE.to(kv.dtype).flatten(0, 1))

    def _attend_singles(self, kv: Tensor, q_MHE: Tensor, scale: float) -> Tensor:
        """One query per sequence: the G heads that share keys are the rows of one small product."""
        M, H, E = q_MHE.shape
        K = kv.shape[2]
        if self.single_lanes is None:
            past = kv[:, :M, :, : self.width]
        else:
            past = kv[:, :, :, : self.width].index_select(1, self.single_lanes)
        q_MKGE = q_MHE.reshape(M, K, H // K, E).to(kv.dtype)
        bias = self.bias_M11S if self.bias_M11S is None else self.bias_M11S.to(kv.dtype)
        o = F.scaled_dot_product_attention(q_MKGE, past[0], past[1], attn_mask=bias, scale=scale)
        return o.reshape(M, H, E).to(q_MHE.dtype)


def _attend_chunk(
    chunk: _Chunks, kv: Tensor, q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, scale: float
) -> Tensor:
    """Several queries per sequence, padded to one width -> [real cells, H, E]."""
    gqa = q_NHE.shape[1] != k_NKE.shape[1]
    q = q_NHE[chunk.take_PT].transpose(1, 2)  # [P, H, T, E]
    if chunk.lanes is None:
        k, v = (x[chunk.take_PT].transpose(1, 2) for x in (k_NKE, v_NKE))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    else:
        assert chunk.visible_PTS is not None
        past = kv[:, :, :, : chunk.visible_PTS.shape[-1]].index_select(1, chunk.lanes)
        o = F.scaled_dot_product_attention(
            q.to(kv.dtype), past[0], past[1], attn_mask=chunk.visible_PTS, scale=scale, enable_gqa=gqa
        )
    return o.transpose(1, 2).flatten(0, 1)[chunk.back]


def _plan_chunks(rows: Sequence[Row], first: int, lanes: Lanes, device: torch.device) -> list[_Chunks]:
    """Group rows of several tokens, of like cost, into padded calls. `first`: flat token of the first row."""
    begins, at = [], first
    for row in rows:
        begins.append(at)
        at += row.n
    order = sorted(range(len(rows)), key=lambda i: (rows[i].start > 0, rows[i].start + rows[i].n, rows[i].n))
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
    return [_chunk([rows[i] for i in g], [begins[i] for i in g], lanes, device) for g in groups]


def _chunk(rows: list[Row], begins: list[int], lanes: Lanes, device: torch.device) -> _Chunks:
    n_P1 = torch.tensor([row.n for row in rows])[:, None]
    step_1T = torch.arange(int(n_P1.max()))[None]
    take_PT = torch.tensor(begins)[:, None] + torch.minimum(step_1T, n_P1 - 1)
    back = (step_1T < n_P1).flatten().nonzero().squeeze(1)
    used = visible = None
    if rows[0].start > 0:
        used = torch.tensor([lanes.lane_of[row.request.id] for row in rows], device=device)
        start_P1 = torch.tensor([row.start for row in rows])[:, None]
        last_PT = start_P1 + torch.minimum(step_1T, n_P1 - 1)
        seen = torch.arange(int(last_PT.max()) + 1)
        visible = (seen <= last_PT[:, :, None])[:, None].to(device)
    at = take_PT.flatten()[back]
    return _Chunks(take_PT.to(device), back.to(device), at.to(device), used, visible)


class Runner:
    """The module and its lanes. Weights are read from the module at every step; nothing is copied, except the
    output head of a 16-bit model, in float32, so that log-probabilities are not rounded to 8 bits."""

    def __init__(self, model: Decoder, lanes: Lanes) -> None:
        self.model = model
        self.lanes = lanes
        self._head: tuple[Tensor, Tensor | None] | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def refresh(self) -> None:
        """Forget what was derived from the weights."""
        self._head = None

    def run(self, plan: Plan) -> Tensor:
        """Compute a plan -> float32 logits [rows with `sample`, V], in the order of `plan.rows`."""
        for request in plan.preempted:
            self.lanes.close(request.id)
        for request in plan.admitted:
            self.lanes.open(request.id)
        self.lanes.reserve(max(row.start + row.n for row in plan.rows))
        self.lanes.restore(plan.admitted)
        # one-token rows first and by lane, so that they are usually the lanes 0..M-1 themselves
        rows = sorted(plan.rows, key=lambda row: (row.n > 1, self.lanes.lane_of[row.request.id]))
        device = self.device
        ids = [t for row in rows for t in row.request.tokens[row.start : row.start + row.n]]
        attend = StepAttention(self.lanes, rows, device)
        hidden_ND = self.model(torch.tensor(ids, device=device), attend.pos_N, attend)
        last: dict[int, int] = {}
        end = 0
        for row in rows:
            end += row.n
            last[row.request.id] = end - 1
        take = [last[row.request.id] for row in plan.rows if row.sample]
        return self._logits(hidden_ND[torch.tensor(take, dtype=torch.long, device=device)])

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        if hidden_BD.dtype == torch.float32:
            return self.model.logits(hidden_BD)
        if self._head is None:
            bias = self.model.head_bias
            self._head = (
                self.model.head_weight().detach().float(),
                None if bias is None else bias.detach().float(),
            )
        logits = F.linear(hidden_BD.float(), *self._head)
        scale = self.model.spec.logit_scale
        return logits if scale == 1.0 else logits * scale
