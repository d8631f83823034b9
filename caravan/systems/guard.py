"""What to do about loss spikes and steps that are not finite.

PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1) restarts from a checkpoint before a spike and
skips the data that led to it. Here, in three grades, all decided from numbers of the run alone, so that a
resumed or repeated run decides the same: a single outlying or non-finite step is not applied; after
`patience` of them in a row the run goes back to the last anchor (a checkpoint at a fixed multiple of steps)
and goes on with the data after the spike; after `max_rollbacks` it stops with a sentence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from caravan.types import UserError

Verdict = Literal["ok", "skip", "rollback"]


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a step is an outlier."""

    sigma: float = 6.0
    """Standard deviations above the running mean; 0 checks for non-finite numbers only."""
    window: int = 64
    """Applied steps the mean and deviation are taken over."""
    least: int = 32
    """Applied steps before anything finite counts as an outlier."""
    patience: int = 3
    """Outliers in a row that cause a rollback."""
    max_rollbacks: int = 3
    """Rollbacks after which the run stops."""


@dataclass
class Guard:
    """The running statistics; `state` and `load` carry them through a checkpoint."""

    config: GuardConfig
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    in_a_row: int = 0
    rollbacks: int = 0

    def judge(self, loss: float, grad_norm: float) -> bool:
        """Is this step fit to be applied? Changes nothing."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return False
        if not self.config.sigma or len(self.losses) < self.config.least:
            return True
        # The margins keep a very smooth run from calling an ordinary hard batch an outlier.
        return loss <= self._limit(self.losses, 0.5) and grad_norm <= self._limit(
            self.norms, 2.0 * _mean(self.norms)
        )

    def record(self, loss: float, grad_norm: float, applied: bool) -> Verdict:
        """Take note of a step and say what to do now. Raises UserError after too many rollbacks."""
        if applied:
            self.in_a_row = 0
            self.losses = [*self.losses, loss][-self.config.window :]
            self.norms = [*self.norms, grad_norm][-self.config.window :]
            return "ok"
        self.in_a_row += 1
        if self.in_a_row < self.config.patience:
            return "skip"
        self.in_a_row = 0
        self.rollbacks += 1
        # Statistics start anew: if the data itself has changed, the new level is the right one to judge by.
        self.losses, self.norms = [], []
        if self.rollbacks > self.config.max_rollbacks:
            raise UserError(
                f"training diverged: {self.config.patience} steps in a row with outlying or non-finite loss "
                f"({loss:.4g}) or gradient norm ({grad_norm:.4g}), {self.rollbacks} times",
                "lower the learning rate (lr), lengthen the warm-up, or try precision fp32",
            )
        return "rollback"

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("losses", "norms", "in_a_row", "rollbacks")}

    def load(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def _limit(self, values: list[float], margin: float) -> float:
        mean = _mean(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        return mean + max(self.config.sigma * deviation, margin)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
