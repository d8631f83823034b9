"""Intervals cover what they promise, and nothing differs from itself."""

import math

import numpy as np
import pytest

from caravan.evals.stats import bootstrap, paired_bootstrap, paired_difference, wilson


def test_identical_results_differ_by_nothing() -> None:
    a = np.random.default_rng(0).normal(size=50)
    assert paired_bootstrap(a, a) == (0.0, 0.0, 0.0)
    found = paired_difference(a, a, seed=3)
    assert (found.value, found.low, found.high, found.p, found.n) == (0.0, 0.0, 0.0, 1.0, 50)


def test_a_constant_shift_is_found_exactly() -> None:
    a = np.arange(40.0)
    value, low, high = paired_bootstrap(a, a + 2.5)
    assert value == pytest.approx(2.5) and low == pytest.approx(2.5) and high == pytest.approx(2.5)
    assert paired_difference(a, a + 2.5).p < 0.001


def test_difference_is_b_minus_a_and_changes_sign() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random(80), rng.random(80) + 0.1
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there.value == pytest.approx(b.mean() - a.mean())
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert there.p == pytest.approx(back.p)


def test_interval_of_a_mean_covers_the_truth_in_95_percent() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(300):
        found = bootstrap(rng.exponential(size=80), seed=seed, resamples=600)
        covered += found.low <= 1.0 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_interval_of_a_paired_difference_covers_and_is_narrower_than_unpaired() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(300):
        hard = rng.normal(size=100)
        a, b = hard + rng.normal(scale=0.2, size=100), hard + 0.3 + rng.normal(scale=0.2, size=100)
        found = paired_difference(a, b, seed=seed, resamples=500)
        covered += found.low <= 0.3 <= found.high
    assert 0.91 <= covered / 300 <= 0.985
    unpaired = bootstrap(b, seed=0)
    assert found.high - found.low < 0.5 * (unpaired.high - unpaired.low)


def test_p_values_are_uniform_when_nothing_differs() -> None:
    rng = np.random.default_rng(4)
    p = [paired_difference(*rng.normal(size=(2, 30)), seed=s, resamples=400).p for s in range(300)]
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.09
    assert 0.4 < np.mean(p) < 0.6


def test_ratio_of_sums_not_mean_of_ratios() -> None:
    assert bootstrap([8.0, 2.0], [1.0, 4.0]).value == 2.0
    bits, size = np.array([10.0, 30.0, 5.0]), np.array([10.0, 10.0, 10.0])
    found = paired_difference(bits, bits * 2, size, size)
    assert found.value == pytest.approx(1.5)


def test_draws_do_not_depend_on_how_they_are_cut_and_repeat_with_the_seed() -> None:
    a = np.random.default_rng(5).random(70)
    assert bootstrap(a, seed=1) == bootstrap(a, seed=1)
    assert bootstrap(a, seed=1) != bootstrap(a, seed=2)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe (1998), table of 95 % score intervals: 81/263, 15/148, 0/20, 1/29.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_published_intervals(right: int, n: int, low: float, high: float) -> None:
    found = wilson(right, n)
    assert found.low == pytest.approx(low, abs=6e-5)
    assert found.high == pytest.approx(high, abs=6e-5)


def test_nothing_measured_is_said_so() -> None:
    assert math.isnan(wilson(0, 0).value) and math.isnan(bootstrap([]).value)
    assert wilson(5, 5).high == 1.0 and wilson(5, 5).low < 0.6
