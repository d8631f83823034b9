"""Uncertainty of every number we print: bootstrap over items, paired between models, Wilson for accuracies.

A metric is a ratio of sums over items, sum(score) / sum(weight): with weights 1 a mean, with bits and bytes
the bits per byte of a corpus. Resampling draws items, so a model's two numbers (or two models' numbers) on
one item stay together (Efron & Tibshirani 1993, ch. 13; Koehn 2004 for the paired test). The p-value is of
the paired permutation test: under the hypothesis that the models are alike, the two results of an item
could be swapped. What we leave out: corrections for many comparisons; the reader sees intervals, not stars.

Shapes: I items, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
_CELLS = 4_000_000
"""Numbers drawn at a time: bounds memory at some tens of megabytes."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value, and where it would fall in 95 % (or `level`) of repetitions with other items."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Difference:
    """`b - a` on the same items, its interval, and the probability of as large a one were both alike."""

    value: float
    low: float
    high: float
    p: float
    n: int


def _array(values: Sequence[float], n: int | None = None) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    assert array.ndim == 1 and (n is None or len(array) == n), (
        "one number per item, the same items on both sides"
    )
    return array


def _bounds(draws_R: np.ndarray, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(draws_R, [tail, 1 - tail])
    return float(low), float(high)


def _ratio(score: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.divide(score, weight, out=np.zeros_like(score), where=weight != 0)


def _resampled(columns_CI: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums of each column over `resamples` draws of I items with replacement: [C, R].

    One seed gives one set of draws for a given I, so that separate calls on the same items are paired too.
    """
    rng = np.random.default_rng(seed)
    n = columns_CI.shape[1]
    out = np.empty((columns_CI.shape[0], resamples))
    step = max(1, _CELLS // max(1, n))
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        index = rng.integers(0, n, size=(stop - start, n))
        for c, column in enumerate(columns_CI):
            out[c, start:stop] = column[index].sum(axis=1)
    return out


def bootstrap(
    scores: Sequence[float], weights: Sequence[float] | None = None, *, seed: int = 0,
    resamples: int = RESAMPLES, level: float = 0.95,
) -> Interval:  # fmt: skip
    """sum(scores) / sum(weights) with its percentile interval; weights default to 1 (a mean). NaN for no
    items."""
    score = _array(scores)
    weight = np.ones_like(score) if weights is None else _array(weights, len(score))
    if not len(score):
        return Interval(math.nan, math.nan, math.nan, 0)
    value = float(_ratio(score.sum(keepdims=True), weight.sum(keepdims=True))[0])
    if weights is None and np.ptp(score) == 0.0:  # a sum of equal numbers need not divide back exactly
        return Interval(float(score[0]), float(score[0]), float(score[0]), len(score))
    sums = _resampled(np.stack([score, weight]), resamples, seed)
    return Interval(value, *_bounds(_ratio(sums[0], sums[1]), level), len(score))


def paired_difference(
    a: Sequence[float], b: Sequence[float], a_weights: Sequence[float] | None = None,
    b_weights: Sequence[float] | None = None, *, seed: int = 0, resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Difference:  # fmt: skip
    """metric(b) - metric(a) on the same items in the same order, with interval and two-sided p-value."""
    score_a, score_b = _array(a), _array(b, len(a))
    n = len(score_a)
    if not n:
        return Difference(math.nan, math.nan, math.nan, math.nan, 0)
    weight_a = np.ones(n) if a_weights is None else _array(a_weights, n)
    weight_b = np.ones(n) if b_weights is None else _array(b_weights, n)
    columns = np.stack([score_a, weight_a, score_b, weight_b])
    if np.array_equal(columns[:2], columns[2:]):
        return Difference(0.0, 0.0, 0.0, 1.0, n)
    total = columns.sum(axis=1, keepdims=True)
    value = float((_ratio(total[2], total[3]) - _ratio(total[0], total[1]))[0])
    sums = _resampled(columns, resamples, seed)
    low, high = _bounds(_ratio(sums[2], sums[3]) - _ratio(sums[0], sums[1]), level)
    return Difference(value, low, high, _permutation_p(columns, value, resamples, seed), n)


def _permutation_p(columns_4I: np.ndarray, observed: float, resamples: int, seed: int) -> float:
    """Two-sided p: share of random swaps of the two results of items with as large a difference (+1)."""
    rng = np.random.default_rng([seed, 1])
    first, second = columns_4I[:2], columns_4I[2:]
    half_sum, half_gap = (first + second) / 2, (second - first) / 2
    n, extreme = columns_4I.shape[1], 0
    centre = half_sum.sum(axis=1)
    step = max(1, _CELLS // max(1, n))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        signs = rng.integers(0, 2, size=(count, n), dtype=np.int8) * 2.0 - 1.0
        gap_R2 = signs @ half_gap.T
        swapped = _ratio(centre[0] + gap_R2[:, 0], centre[1] + gap_R2[:, 1])
        kept = _ratio(centre[0] - gap_R2[:, 0], centre[1] - gap_R2[:, 1])
        extreme += int(np.sum(np.abs(swapped - kept) >= abs(observed) - 1e-12))
    return (extreme + 1) / (resamples + 1)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], seed: int = 0, *, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """(mean(b) - mean(a), low, high): two models on the same items, with a 95 % interval."""
    found = paired_difference(a, b, seed=seed, resamples=resamples)
    return found.value, found.low, found.high


def wilson(right: float, n: int, level: float = 0.95) -> Interval:
    """Share `right / n` with the score interval of Wilson (1927): sound near 0 and 1, where a bootstrap is
    empty.

    centre = (p + z^2 / 2n) / (1 + z^2 / n),   half = z sqrt(p (1-p) / n + z^2 / 4n^2) / (1 + z^2 / n)
    """
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p = right / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    low = 0.0 if right == 0 else max(0.0, centre - half)
    high = 1.0 if right == n else min(1.0, centre + half)
    return Interval(p, low, high, n)
