"""Learning rates and batch sizes over time: pure functions of the step number, so a resumed run needs no
state.

Warm-up is linear. Then `cosine` (Loshchilov & Hutter 2016, arXiv 1608.03983), `linear`, `constant`, or `wsd`
(warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395; decay 1 - sqrt as in Hägele et al. 2024,
arXiv 2405.18392, which ends lower than a straight line for the same number of steps).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["cosine", "wsd", "linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the learning rate moves between step 0 and the last step."""

    kind: ScheduleKind = "cosine"
    """Shape after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear rise from 0 (exclusive) to the peak."""
    final_ratio: float = 0.1
    """Learning rate at the end, as a share of the peak (not used by `constant`)."""
    decay_share: float = 0.2
    """`wsd` only: the last share of all steps in which the rate falls."""


def lr_at(step: int, steps: int, peak: float, schedule: Schedule) -> float:
    """Learning rate of step `step` (0-based) out of `steps`; the peak is reached at the end of the warm-up.

    The final ratio would be reached at step `steps`, one past the last: with ratio 0 no step is done for
    nothing.

    Raises ValueError for an unknown kind.
    """
    warmup = min(schedule.warmup_steps, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "wsd":
        decay_steps = max(round(steps * schedule.decay_share), 1)
        done = max(0.0, (step - (steps - decay_steps)) / decay_steps)
        remaining = 1.0 - math.sqrt(done)
    else:
        done = (step - warmup) / (steps - warmup)
        if schedule.kind == "cosine":
            remaining = 0.5 * (1.0 + math.cos(math.pi * done))
        elif schedule.kind == "linear":
            remaining = 1.0 - done
        else:
            raise ValueError(f"unknown schedule {schedule.kind!r}")
    return peak * (schedule.final_ratio + (1.0 - schedule.final_ratio) * remaining)


def batch_tokens_at(step: int, batch_tokens: int, ramp_steps: int, start_share: float = 0.25) -> int:
    """Tokens of step `step` when the batch grows linearly from `start_share` to all of `batch_tokens`.

    Small batches early cost little gradient quality while the loss falls fast and give more updates per token
    (Smith et al. 2017, arXiv 1711.00489; McCandlish et al. 2018, arXiv 1812.06162). `ramp_steps` 0 is no
    ramp.
    """
    if step >= ramp_steps:
        return batch_tokens
    share = start_share + (1.0 - start_share) * step / ramp_steps
    return max(1, int(batch_tokens * share))
