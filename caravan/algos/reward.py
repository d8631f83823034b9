"""Reward models: ranking losses, centring, and what to know about a model before trusting it.

Bradley-Terry: P(better beats worse) = sigmoid(s_better - s_worse). With K ranked answers to one prompt the
loss is the mean over all strictly ordered pairs of that prompt (Ouyang et al. 2022, arXiv 2203.02155, eq. 1),
every answer scored once in the same forward; ties give no pair. `softmax_loss` is the other usual choice:
cross-entropy of the best of K (Ziegler et al. 2019, arXiv 1909.08593, eq. 1).

Shapes: S scored answers, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from caravan.types import Loss


@dataclass(frozen=True, slots=True)
class PairIndex:
    """Which of S flat answers form pairs: answer `better[p]` beats `worse[p]`; weights of one prompt sum to
    1."""

    better: tuple[int, ...]
    worse: tuple[int, ...]
    weight: tuple[float, ...]
    prompts: int
    """Prompts with at least one pair: the unit of the normaliser."""


def ranked_pairs(ranks: Sequence[Sequence[int]]) -> PairIndex:
    """All strictly ordered pairs of each prompt. `ranks[g][k]` belongs to flat answer k + answers before g; 0
    is best."""
    better: list[int] = []
    worse: list[int] = []
    weight: list[float] = []
    prompts = start = 0
    for group in ranks:
        pairs = [(i, j) for i, a in enumerate(group) for j, b in enumerate(group) if a < b]
        better += [start + i for i, _ in pairs]
        worse += [start + j for _, j in pairs]
        weight += [1.0 / len(pairs) for _ in pairs]
        prompts += bool(pairs)
        start += len(group)
    return PairIndex(tuple(better), tuple(worse), tuple(weight), prompts)


def pairwise_loss(
    difference_P: Tensor,
    normaliser: float,
    *,
    weight_P: Tensor | None = None,
    margin: float | Tensor = 0.0,
    target: float | Tensor = 1.0,
) -> Loss:
    """sum of -w [t log sigmoid(d - m) + (1 - t) log sigmoid(m - d)] / normaliser, d = s_better - s_worse.

    `margin` asks for a distance (Touvron et al. 2023, 2307.09288, eq. 2); `target` below 1 is a soft label
    (share of judges, AI feedback). Written with logsigmoid: log(sigmoid(-1e4)) would be -inf.
    """
    d_P = difference_P - margin
    weight = torch.ones_like(d_P) if weight_P is None else weight_P.to(d_P.dtype)
    loss_P = -(target * F.logsigmoid(d_P) + (1.0 - target) * F.logsigmoid(-d_P))
    value = (weight * loss_P).sum() / normaliser
    with torch.no_grad():
        right_P = _right(difference_P.detach())
        stats = {
            "loss": value.detach(),
            "accuracy": (weight * right_P).sum() / normaliser,
            "margin": (weight * difference_P.detach()).sum() / normaliser,
        }
    return Loss(value, stats)


def softmax_loss(score_S: Tensor, ranks: Sequence[Sequence[int]], normaliser: float) -> Loss:
    """Cross-entropy of the best answer among the K of its prompt; several best share the label. ln K at equal
    scores."""
    total = score_S.new_zeros(())
    right = score_S.new_zeros(())
    start = 0
    for group in ranks:
        s_K = score_S[start : start + len(group)]
        best_K = torch.tensor([r == min(group) for r in group], device=score_S.device, dtype=score_S.dtype)
        total = total - (torch.log_softmax(s_K, 0) * best_K).sum() / best_K.sum()
        right = right + best_K[s_K.detach().argmax()]
        start += len(group)
    value = total / normaliser
    return Loss(value, {"loss": value.detach(), "accuracy": right / normaliser})


def centring_loss(sum_P: Tensor, normaliser: float, coefficient: float) -> Tensor:
    """coefficient * mean (s_better + s_worse)^2: holds the scale in place while training (Eisenstein et al.
    2023, 2312.09244, sec. 2). `sum_P` is s_better + s_worse."""
    return coefficient * sum_P.square().sum() / normaliser


def _right(difference_P: Tensor) -> Tensor:
    """1 where the better answer scores higher, one half at a tie."""
    return (difference_P > 0).float() + 0.5 * (difference_P == 0).float()


def accuracy(difference_P: Tensor) -> float:
    """Share of pairs ordered as the judge ordered them; a tie of scores counts half."""
    return float(_right(difference_P).mean())


def calibration(difference_P: Tensor, bins: int = 10) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error and the reliability diagram.

    The model's confidence in its own choice, sigmoid(|d|) in [0.5, 1], against how often that choice is
    right, in `bins` equal bins; ECE = sum over bins of n/P |accuracy - confidence| (Guo et al. 2017,
    1706.04599, eq. 3).
    """
    confidence_P = torch.sigmoid(difference_P.double().abs())
    right_P = _right(difference_P).double()
    which_P = ((confidence_P - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    table, ece = [], 0.0
    for b in range(bins):
        inside = which_P == b
        n = int(inside.sum())
        if n == 0:
            continue
        confidence, right = float(confidence_P[inside].mean()), float(right_P[inside].mean())
        ece += n / len(difference_P) * abs(right - confidence)
        low = 0.5 + b / (2 * bins)
        table.append(
            {"low": low, "high": low + 0.5 / bins, "n": n, "confidence": confidence, "accuracy": right}
        )
    return ece, table


def length_bias(difference_P: Tensor, length_difference_P: Tensor) -> dict[str, float]:
    """Does the model pay for length? `length_difference_P` = tokens of the better minus tokens of the worse
    answer.

    correlation: sum d l / sqrt(sum d^2 sum l^2), which does not change when a pair is turned round (a Pearson
    correlation would). accuracy_shorter / accuracy_longer: where the better answer is the shorter / the
    longer one, with the pairs behind each; a model that only counts tokens has 0 and 1.
    """
    d, n = difference_P.double(), length_difference_P.double()
    norm = float(d.square().sum().sqrt() * n.square().sum().sqrt())
    out = {"correlation": float((d * n).sum()) / norm if norm > 0 else 0.0}
    for name, where in (("shorter", n < 0), ("longer", n > 0)):
        out[f"pairs_{name}"] = float(where.sum())
        out[f"accuracy_{name}"] = accuracy(difference_P[where]) if bool(where.any()) else math.nan
    return out
