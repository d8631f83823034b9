"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    loss = -log sigmoid(beta h),   h = (log pi(c) - log pi(r)) - (log ref(c) - log ref(r))

on *sums* of response log-probs (an average would make beta depend on the length). With label smoothing eps the labels
are taken to be wrong with that probability (Mitchell 2023, "cDPO"): the optimum is then finite, beta h = log((1-eps)/eps).
At step 0 policy and reference agree, h = 0 and the loss is ln 2.

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
"""The loss while policy and reference agree: ln 2, whatever beta and smoothing are."""


def loss(
    chosen_P: Tensor,
    rejected_P: Tensor,
    ref_chosen_P: Tensor,
    ref_rejected_P: Tensor,
    normaliser: float,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Loss:
    """[P] sums of response log-probs under policy and reference -> sum over pairs / normaliser (pairs of the step).

    Stats, each divided by the normaliser: implicit rewards beta (log pi - log ref) of both sides, their margin, and
    the accuracy of its sign (a tie counts half).
    """
    chosen_reward_P = beta * (chosen_P - ref_chosen_P)
    rejected_reward_P = beta * (rejected_P - ref_rejected_P)
    margin_P = chosen_reward_P - rejected_reward_P
    loss_P = -(1.0 - label_smoothing) * F.logsigmoid(margin_P)
    if label_smoothing:
        loss_P = loss_P - label_smoothing * F.logsigmoid(-margin_P)
    value = loss_P.sum() / normaliser
    with torch.no_grad():
        margin = margin_P.detach()
        right = (margin > 0).sum() + 0.5 * (margin == 0).sum()
        stats = {
            "loss": value.detach(),
            "reward_chosen": chosen_reward_P.detach().sum() / normaliser,
            "reward_rejected": rejected_reward_P.detach().sum() / normaliser,
            "margin": margin.sum() / normaliser,
            "accuracy": right / normaliser,
        }
    return Loss(value, stats)
