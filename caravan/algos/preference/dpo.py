"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    loss = -log sigmoid(beta h),   h = (log pi(c) - log pi(r)) - (log ref(c) - log ref(r))

on *sums* of response log-probs (an average would make beta depend on the length). With label smoothing eps
the labels are taken to be wrong with that probability (Mitchell 2023, "cDPO"): the optimum is then finite,
beta h = log((1-eps)/eps). At step 0 policy and reference agree, h = 0 and the loss is ln 2.

Shapes: P pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from caravan.types import Loss

VERSION = 1
NEEDS = ("reference",)
FIRST_LOSS = 0.6931471805599453
"""The loss while policy and reference agree: ln 2, whatever beta and smoothing are. The stage audits it."""


def loss(
    chosen_P: Tensor,
    rejected_P: Tensor,
    ref_chosen_P: Tensor,
    ref_rejected_P: Tensor,
    normaliser: float,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    weight_P: Tensor | None = None,
) -> Loss:
    """[P] sums of response log-probs under policy and reference -> weighted sum over pairs / normaliser.

    The normaliser is the weight of the whole step: its pairs, or its prompts where the pairs of one share a
    weight of 1. Stats, each divided by the normaliser: implicit rewards beta (log pi - log ref) of both
    sides, their margin, and the accuracy of its sign (a tie counts half).
    """
    chosen_reward_P = beta * (chosen_P - ref_chosen_P)
    rejected_reward_P = beta * (rejected_P - ref_rejected_P)
    margin_P = chosen_reward_P - rejected_reward_P
    loss_P = -(1.0 - label_smoothing) * F.logsigmoid(margin_P)
    if label_smoothing:
        loss_P = loss_P - label_smoothing * F.logsigmoid(-margin_P)
    share_P = (torch.ones_like(loss_P) if weight_P is None else weight_P.to(loss_P.dtype)) / normaliser
    value = (share_P * loss_P).sum()
    with torch.no_grad():
        right_P = (margin_P > 0).to(share_P.dtype) + 0.5 * (margin_P == 0).to(share_P.dtype)
        stats = {
            "loss": value.detach(),
            "reward_chosen": (share_P * chosen_reward_P.detach()).sum(),
            "reward_rejected": (share_P * rejected_reward_P.detach()).sum(),
            "margin": (share_P * margin_P.detach()).sum(),
            "accuracy": (share_P * right_P).sum(),
        }
    return Loss(value, stats)
