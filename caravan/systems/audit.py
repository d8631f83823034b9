"""Checks a trainer makes on itself, each with a name and a remedy.

A check that finds the run meaningless raises UserError; one that finds it merely suspicious returns a
warning. They cost next to nothing and run in the first steps, where every silent bug of training code already
shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from caravan.systems import parallel
from caravan.systems.train import Trainee
from caravan.types import Batch, UserError


def normaliser(value: float, step: int) -> None:
    """supervised-tokens: a step without any supervised token has no loss (and 0/0 is no gradient)."""
    if not value > 0:
        raise UserError(
            f"audit supervised-tokens: step {step} has no token with a loss",
            "no example has an assistant turn, or all are cut off before it; look at the data",
        )


def batches(step_batches: Sequence[Batch], step: int) -> None:
    """batch-shape: lengths add up, positions restart with each segment, no batch is empty of supervision."""
    for i, batch in enumerate(step_batches):
        assert sum(batch.lengths) == batch.ids_N.numel() == batch.targets_N.numel(), (
            f"step {step} batch {i}: lengths"
        )
        if not bool((batch.weight_N > 0).any()):
            raise UserError(
                f"audit batch-shape: micro batch {i} of step {step} has no supervised token",
                "this is a bug of the packer if the data set has assistant turns; please report it",
            )


def fresh_loss(loss: float, vocab: int) -> str | None:
    """fresh-loss: an untrained model knows nothing, so its loss is ln(vocab) within 10 %."""
    expected = math.log(vocab)
    if abs(loss - expected) > 0.1 * expected + 0.1:
        return (
            f"audit fresh-loss: the first loss is {loss:.3f}, ln(vocab) is {expected:.3f}; "
            "initialisation, targets or normaliser are suspect"
        )
    return None


def gradients(trainee: Trainee) -> str | None:
    """gradient-reach: after the first step every trainable parameter has had a gradient."""
    missing = trainee.unreached
    if missing:
        return f"audit gradient-reach: no gradient for {', '.join(missing[:5])}" + (
            " ..." if len(missing) > 5 else ""
        )
    return None


def ranks_agree(trainee: Trainee, step: int) -> None:
    """equal-ranks: all ranks hold the same weights, byte for byte. Raises RuntimeError if not."""
    if parallel.rank_world()[1] == 1:
        return
    if not parallel.equal_everywhere(parallel.fingerprint(trainee.weights())):
        raise RuntimeError(f"audit equal-ranks: weights differ between ranks at step {step}; the run is void")
