"""Where keys, values and recurrent states of running sequences lie.

Keys and values lie in *lanes*, one contiguous row of positions per sequence, so that decoding is one batched
attention call over a view and nothing is gathered (on a CPU the gather of a paged cache costs more than the
attention). Published blocks are copied once into the *pool*, from which any later sequence with the same
prefix copies them into its own lane. Layers with a recurrence keep one state per lane instead. Lanes are kept
dense: a sequence that ends gives its place to the last one, cache and states with it.

A layer that sees only a window keeps no more than that and one step's tokens: its lanes are rings, where
position p lies at p modulo the capacity.

On a CPU lanes are float32 whatever the model's type: one-token attention over a bfloat16 cache measured 2 to
5 times slower (torch 2.13, AVX512 with bf16 units). Values of a bfloat16 model are kept exactly.

Shapes: N flat tokens, R rows of a step, K key/value heads, E key width, V value width, C capacity of a lane,
L lanes, X blocks, Z block size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from caravan.engine.scheduler import Request

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


class Lanes:
    """Storage of all layers; a layer's tensors are made when it is first seen."""

    def __init__(
        self, lanes: int, blocks: int, block_size: int, max_context: int, reach: int | None = None
    ) -> None:
        """`reach`: most tokens of one sequence in a step, for rings; None: every layer keeps everything."""
        self.reach = reach
        self.windows: dict[int, int | None] = {}
        self.count, self.blocks, self.block_size = lanes, blocks, block_size
        self.rows = 1  # lanes that have memory; one long chat must not pay for sixteen
        self.limit = -(-max_context // block_size) * block_size
        self.capacity = min(self.limit, max(64, 4 * block_size) // block_size * block_size)
        self.kv: dict[int, Pair] = {}  # layer -> [L, K, C, E] and [L, K, C, V]
        self.pool: dict[int, Pair] = {}  # layer -> [X, K, Z, E] and [X, K, Z, V]
        self.states: dict[int, dict[str, Tensor]] = {}  # layer, or -1 - layer for its FFN -> [L, ...] by name
        self.order: list[int] = []  # request id of each lane in use
        self.lane_of: dict[int, int] = {}
        self.coarser: dict[int, Lanes] = {}  # patch size -> lanes with one position for every patch

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
            for tensor in self._tensors():
                if last < tensor.shape[0]:  # else it never ran
                    tensor[lane] = tensor[last]
            moved = self.order[last]
            self.order[lane] = moved
            self.lane_of[moved] = lane
        self.order.pop()

    def coarse(self, size: int) -> Lanes:
        """The same lanes with one position for every `size` tokens. They are reserved by whoever writes."""
        if size not in self.coarser:
            lanes = Lanes(self.count, 0, 1, -(-self.limit // size))
            lanes.order, lanes.lane_of = self.order, self.lane_of
            self.coarser[size] = lanes
        return self.coarser[size]

    def _tensors(self) -> list[Tensor]:
        coarser = [tensor for lanes in self.coarser.values() for tensor in lanes._tensors()]
        kept = coarser + [tensor for pair in self.kv.values() for tensor in pair]
        return kept + [tensor for state in self.states.values() for tensor in state.values()]

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
        for layer, (keys, values) in self.kv.items():
            capacity = self.capacity_of(self.windows[layer])
            self.kv[layer] = _grown(keys, self.rows, capacity), _grown(values, self.rows, capacity)
        for state in self.states.values():
            for name, tensor in state.items():
                state[name] = _grown(tensor, self.rows)

    # ------------------------------------------------------------------ keys and values

    def capacity_of(self, window: int | None) -> int:
        """Positions that a layer with this window keeps per lane; what grows has not yet gone round."""
        if window is None or self.reach is None:
            return self.capacity
        return min(self.capacity, (-(-(window + self.reach) // self.block_size) + 1) * self.block_size)

    def layer(self, layer: int, k_NKE: Tensor, v_NKV: Tensor, window: int | None = None) -> Pair:
        """[L, K, C, E] and [L, K, C, V] of a layer, zero where never written (a masked value must still be a
        number)."""
        pair = self.kv.get(layer)
        if pair is None:
            self.windows[layer] = window
            pair = self._make(k_NKE, window), self._make(v_NKV, window)
            self.kv[layer] = pair
        return pair

    def _make(self, x_NKE: Tensor, window: int | None) -> Tensor:
        dtype = torch.float32 if x_NKE.device.type == "cpu" else x_NKE.dtype
        shape = self.rows, x_NKE.shape[1], self.capacity_of(window), x_NKE.shape[2]
        return x_NKE.new_zeros(shape, dtype=dtype)

    def store(self, items: Sequence[tuple[Request, int, int]]) -> None:
        """Copy blocks that became shareable, (request, block of the sequence, block id), into the pool."""
        self._copy([(self.lane_of[r.id], i, block, 0) for r, i, block in items], to_pool=True)

    def restore(self, requests: Sequence[Request]) -> None:
        """Copy the cached prefix of requests that start into their lanes."""
        size = self.block_size
        self._copy(
            [
                (self.lane_of[r.id], i, block, r.cached // size - i)
                for r in requests
                for i, block in enumerate(r.blocks[: r.cached // size])
            ],
            to_pool=False,
        )

    def _copy(self, items: Sequence[tuple[int, int, int, int]], to_pool: bool) -> None:
        """Items are (lane, block of the sequence, block id, how many blocks from the last one copied): a ring
        takes only as many of the last as it holds."""
        if not items:
            return
        size = self.block_size
        for layer, pair in self.kv.items():
            if layer not in self.pool:
                self.pool[layer] = tuple(  # type: ignore[assignment]
                    x.new_empty(self.blocks, x.shape[1], size, x.shape[3]) for x in pair
                )
            count = pair[0].shape[2] // size
            held = [(lane, i % count, block) for lane, i, block, rank in items if rank <= count]
            lane, index, block = (torch.tensor(c, device=pair[0].device) for c in zip(*held, strict=True))
            for lanes, pool in zip(pair, self.pool[layer], strict=True):
                cells = lanes.unflatten(2, (-1, size))  # [L, K, C/Z, Z, E]
                if to_pool:
                    pool[block] = cells[lane, :, index]
                else:
                    cells[lane, :, index] = pool[block]

    # ------------------------------------------------------------------ recurrent states

    def state(self, index: int, lane_R: Tensor, fresh_R: Tensor) -> dict[str, Tensor] | None:
        """State of the lanes of a step's rows, zero for rows that start; None before anything was kept."""
        kept = self.states.get(index)
        if kept is None:
            return None
        state = {name: tensor.index_select(0, lane_R) for name, tensor in kept.items()}
        for tensor in state.values():
            tensor[fresh_R] = 0
        return state

    def keep(self, index: int, lane_R: Tensor, state: dict[str, Tensor]) -> None:
        """Put the state after a step's rows, tensors [R, ...], into their lanes."""
        kept = self.states.setdefault(index, {})
        for name, tensor in state.items():
            if name not in kept:
                kept[name] = tensor.new_zeros(self.rows, *tensor.shape[1:])
            kept[name].index_copy_(0, lane_R, tensor.to(kept[name].dtype))


def _grown(old: Tensor, rows: int, capacity: int | None = None) -> Tensor:
    """A copy with more lanes, and more positions on axis 2; zero where it is new."""
    shape = list(old.shape)
    shape[0] = rows
    if capacity is not None:
        shape[2] = capacity
    new = old.new_zeros(shape)
    if capacity is None:
        new[: old.shape[0]] = old
    else:
        new[: old.shape[0], :, : old.shape[2]] = old
    return new
