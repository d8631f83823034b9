"""The small parts of encoders against slow definitions: rows, buckets, heads, rules for what lies beside."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from caravan.model import families, rules
from caravan.model.encoders.deberta import log_buckets
from caravan.model.encoders.rows import Rows, attention, relative, t5_buckets
from caravan.model.heads import Pool, PooledHead
from caravan.model.tensors import Renamed

lengths = st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(any)


@given(lengths, st.randoms(use_true_random=False))
def test_rows_are_the_segments_and_come_back(found: list[int], draw: random.Random) -> None:
    keys = [draw.randrange(2) for _ in found]
    for chosen in (None, keys):
        rows = Rows(found, torch.device("cpu"), chosen)
        x = torch.arange(sum(found) * 2).view(-1, 2)
        parts, segments = rows.split(x), x.split(found)
        assert sorted(s for group in rows.groups for s in group) == [s for s, n in enumerate(found) if n]
        for part, group, length in zip(parts, rows.groups, rows.lengths, strict=True):
            assert part.shape == (len(group), length, 2), "no cell is padding"
            assert chosen is None or len({chosen[s] for s in group}) == 1
            for row, s in zip(part, group, strict=True):
                assert torch.equal(row, segments[s])
        assert torch.equal(rows.join(parts), x)


def test_two_sides_of_an_attention_fall_into_the_same_groups() -> None:
    left, right = (3, 5, 3, 3, 5), (2, 2, 2, 4, 2)
    device = torch.device("cpu")
    assert Rows(left, device, right).groups == Rows(right, device, left).groups == [[0, 2], [1, 4], [3]]


def slow_bucket(distance: int, buckets: int, furthest: int, both: bool) -> int:
    """Raffel et al. 2020 in words: half the buckets exactly, half in steps that grow by a constant factor."""
    side = 0
    if both:
        buckets //= 2
        side, distance = (buckets if distance > 0 else 0), abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return side + distance
    steps = math.log(distance / exact) / math.log(furthest / exact) * (buckets - exact)
    return side + min(exact + int(steps + 1e-6), buckets - 1)


@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 16), (12, 100), (512, 2048)])
@pytest.mark.parametrize("both", [True, False])
def test_buckets_of_t5(buckets: int, furthest: int, both: bool) -> None:
    reach = 2 * furthest
    distance = torch.arange(-reach, reach + 1)
    want = [slow_bucket(d, buckets, furthest, both) for d in distance.tolist()]
    got = t5_buckets(distance, buckets, furthest, both)
    assert got.tolist() == want
    assert int(got.min()) == 0 and int(got.max()) == buckets - 1
    for n in range(1, reach):  # never fewer for the further one
        assert got[reach - n - 1] >= got[reach - n]


@pytest.mark.parametrize(("buckets", "furthest"), [(256, 512), (8, 64), (6, 30)])
def test_log_buckets_round_up_and_are_odd(buckets: int, furthest: int) -> None:
    distance = torch.arange(-furthest + 1, furthest)
    got = log_buckets(distance, buckets, furthest)
    assert torch.equal(got, -got.flip(0))
    middle = buckets // 2
    for d, found in zip(distance.tolist(), got.tolist(), strict=True):
        if abs(d) <= middle:
            assert found == d
        else:
            steps = math.log(abs(d) / middle) / math.log((furthest - 1) / middle) * (middle - 1)
            assert abs(found) == math.ceil(steps - 1e-5) + middle
    assert int(got.max()) == buckets - 1


def test_relative_positions_start_where_the_query_stands() -> None:
    assert relative(2, 4, torch.device("cpu"), start=2).tolist() == [[-2, -1, 0, 1], [-3, -2, -1, 0]]


def test_attention_is_softmax_of_scaled_and_biased_products() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 4, 5), torch.randn(2, 6, 4, 5)
    bias = torch.randn(4, 3, 6)
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) * 0.7 + bias
    want = torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v)
    torch.testing.assert_close(attention(q, k, v, bias, 0.7), want)


def test_a_pooled_head_is_fp32_and_its_bias_is_subtracted() -> None:
    head = PooledHead(
        16, Pool(act="tanh", reads="first"), bias=0.5, generator=torch.Generator().manual_seed(0)
    )
    assert head.pool is not None
    hidden = torch.randn(3, 16).bfloat16()
    by_hand = torch.tanh(hidden.float() @ head.pool.weight.T) @ head.score.weight.T
    torch.testing.assert_close(head(hidden), by_hand[:, 0] - 0.5)
    torch.testing.assert_close(head.labels(hidden), by_hand)
    same = PooledHead(16, Pool(act="tanh", reads="first"), generator=torch.Generator().manual_seed(0))
    assert torch.equal(head.score.weight, same.score.weight)
    assert PooledHead(16, Pool(act=None, reads="last"), labels=3)(hidden[None]).shape == (1, 3, 3)


def test_what_a_use_does_not_need_is_told_from_what_does_not_belong() -> None:
    family = families.find("bert")
    table = rules.of(family)
    steps = [rules.Step("pool.weight", ("bert.pooler.dense.weight",), (), None)]
    keys = ["bert.pooler.dense.weight", "cls.predictions.bias", "classifier.weight", "bert.surprise"]
    assert rules.beside(family.KEPT, steps, table, keys) == {"cls.predictions.bias", "classifier.weight"}
    assert rules.beside(family.KEPT, [], table, keys[:1]) == {"bert.pooler.dense.weight"}
    assert rules.beside(family.KEPT, steps, table, ["pooler.dense.weight"]) == set(), "a file without prefix"
    assert rules.beside("", [], table, keys) == set()


def test_renamed_tensors_are_read_when_asked_for() -> None:
    renamed = Renamed(
        {"a.gamma": torch.ones(1), "b": torch.zeros(1)}, lambda key: key.replace("gamma", "weight")
    )
    assert set(renamed) == {"a.weight", "b"} and len(renamed) == 2
    assert float(renamed["a.weight"]) == 1.0
    with pytest.raises(KeyError):
        renamed["a.gamma"]
