"""Runs one plan through the decoder: which rows, in which order, and the logits of those that draw.

Shapes: N flat tokens of a step, B rows that draw, D width, V vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from caravan.engine.attend import StepAttention
from caravan.engine.lanes import Lanes
from caravan.engine.scheduler import Plan
from caravan.model.decoder import Decoder


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
        prefixes = None
        if self.model.spec.prefix_token is not None:
            prefixes = [row.request.prefix for row in rows]
        attend = StepAttention(self.lanes, rows, device, prefixes)
        hidden_ND = self.model(torch.tensor(ids, device=device), attend.pos_N, attend)
        last: dict[int, int] = {}
        end = 0
        for row in rows:
            end += row.n
            last[row.request.id] = end - 1
        take = [last[row.request.id] for row in plan.rows if row.sample]
        return self._logits(hidden_ND[torch.tensor(take, dtype=torch.long, device=device)])

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        if hidden_BD.dtype == torch.float32 and not self.model.spec.head_norm:
            return self.model.logits(hidden_BD)
        if self._head is None:
            bias = self.model.head_bias
            self._head = (
                self.model.head_weight().detach().float(),
                None if bias is None else bias.detach().float(),
            )
        return self.model.shaped(F.linear(hidden_BD.float(), *self._head))
