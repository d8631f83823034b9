"""Flat batches and what goes into them."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from caravan.data.pack import best_fit, first_fit, fit, group_batch, lm_batch, positions
from caravan.data.render import Rendered


def rendered(ids: list[int], mask: str) -> Rendered:
    return Rendered(ids, [m == "x" for m in mask])


def test_batch_worked_out_by_hand() -> None:
    batch = lm_batch([rendered([5, 6, 7], "..x"), rendered([8, 9], ".x")])
    assert batch.ids_N.tolist() == [5, 6, 7, 8, 9]
    assert batch.pos_N.tolist() == [0, 1, 2, 0, 1]
    assert batch.lengths == (3, 2)
    assert batch.targets_N.tolist() == [6, 7, 0, 9, 0]
    assert batch.weight_N.tolist() == [0, 1, 0, 1, 0]
    assert (batch.ids_N.dtype, batch.weight_N.dtype) == (torch.int64, torch.float32)


def test_first_token_of_the_next_segment_is_no_target() -> None:
    batch = lm_batch([rendered([1, 2], "xx"), rendered([3, 4], "xx")])
    assert batch.weight_N.tolist() == [1, 0, 1, 0]


def test_groups_keep_their_order_and_index() -> None:
    a, b = rendered([1, 2], ".x"), rendered([3, 4, 5], "..x")
    batch = group_batch([[a, b], [b, a, a]], [7, 9])
    assert batch.groups == (2, 3) and batch.index == (7, 9)
    assert batch.lengths == (2, 3, 3, 2, 2)


def test_too_long_is_cut_behind_an_answer() -> None:
    two_turns = rendered([1, 2, 3, 4, 5, 6, 7, 8], ".xx..xx.")
    assert fit(two_turns, 8) == two_turns
    assert fit(two_turns, 7) == rendered([1, 2, 3, 4, 5, 6, 7], ".xx..xx")
    assert fit(two_turns, 6) == rendered([1, 2, 3], ".xx")
    assert fit(two_turns, 3) == rendered([1, 2, 3], ".xx")
    assert fit(two_turns, 2) is None, "half an answer teaches to stop nowhere"
    assert fit(rendered([1, 2], ".."), 5) is None
    assert fit(rendered([1, 2], "x."), 5) is None, "the first token is never predicted"


@given(st.lists(st.integers(1, 60), max_size=60), st.integers(1, 64))
def test_packing_loses_nothing_and_holds_the_budget(lengths: list[int], budget: int) -> None:
    bins = first_fit(lengths, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    for b in bins:
        assert b == sorted(b) and b
        assert sum(lengths[i] for i in b) <= budget or len(b) == 1
    assert bins == first_fit(list(lengths), budget)
    full = sum(min(n, budget) for n in lengths)
    assert len(bins) <= 2 * -(-full // budget), "first-fit leaves at most one bin half empty"


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 64))
def test_first_fit_is_first_fit(lengths: list[int], budget: int) -> None:
    """The segment tree against the definition."""
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        free = [b for b in bins if sum(lengths[j] for j in b) + lengths[i] <= budget]
        (free[0] if free else bins.append([]) or bins[-1]).append(i)
    assert first_fit(lengths, budget) == [sorted(b) for b in bins]


def test_positions() -> None:
    assert positions([2, 1, 3]).tolist() == [0, 1, 0, 0, 1, 2]
    assert positions([]).dtype == np.int64


def naive_best_fit(lengths: list[int], budget: int) -> list[int]:
    """Room taken per bin, by the definition."""
    bins: list[int] = []
    for n in sorted(lengths, reverse=True):
        fits = [k for k, used in enumerate(bins) if used + n <= budget]
        if fits:
            bins[max(fits, key=lambda k: bins[k])] += n
        else:
            bins.append(n)
    return sorted(bins)


@given(st.lists(st.integers(1, 70), max_size=80), st.integers(1, 64))
def test_best_fit_is_best_fit(lengths: list[int], budget: int) -> None:
    bins = best_fit(lengths, budget)
    used = np.bincount(bins, lengths) if lengths else np.zeros(0)
    assert sorted(used.astype(int).tolist()) == naive_best_fit(lengths, budget)
    assert np.array_equal(bins, best_fit(np.asarray(lengths, np.int64), budget))
    assert sorted(set(bins.tolist())) == list(range(len(used))), "no bin is empty"


def test_best_fit_wastes_less_than_the_others() -> None:
    """Documents of many sizes: share of the budget that stays empty."""
    rng = np.random.default_rng(5)
    lengths = np.minimum(rng.lognormal(5, 1, 4000).astype(int) + 1, 1024)

    def waste(rows: int) -> float:
        return 1 - lengths.sum() / (rows * 1024)

    fit, first = int(best_fit(lengths, 1024).max()) + 1, len(first_fit(lengths.tolist(), 1024))
    assert waste(fit) <= waste(first) < waste(len(lengths)) and waste(fit) < 0.01 < 0.7 < waste(len(lengths))
