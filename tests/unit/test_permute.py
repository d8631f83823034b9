"""The Feistel order is a permutation, differs by seed, and looks random."""

import numpy as np
import pytest

from caravan.data.permute import feistel, mix


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 1000, 12345, 65536])
@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_bijection(n: int, seed: int) -> None:
    assert np.array_equal(np.sort(feistel(np.arange(n), n, seed)), np.arange(n))


def test_random_access_agrees_with_the_whole() -> None:
    whole = feistel(np.arange(999), 999, 5)
    assert [int(feistel(i, 999, 5)[0]) for i in (0, 500, 998)] == [int(whole[i]) for i in (0, 500, 998)]


def test_far_positions_cost_nothing() -> None:
    n = 49_000_000_000
    out = feistel(np.arange(5_000_000_000, 5_000_000_064), n, 3)
    assert len(set(out.tolist())) == 64 and out.max() < n


def test_seeds_differ_and_order_is_no_order() -> None:
    a, b = feistel(np.arange(1000), 1000, 0), feistel(np.arange(1000), 1000, 1)
    assert np.mean(a == b) < 0.02
    assert abs(np.corrcoef(a, np.arange(1000))[0, 1]) < 0.1
    assert np.mean(np.diff(a) == 1) < 0.02


def test_mix_tells_numbers_apart() -> None:
    assert len({mix(a, b) for a in range(50) for b in range(50)}) == 2500
    assert mix(1, 2) != mix(2, 1)
