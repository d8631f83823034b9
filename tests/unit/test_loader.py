"""Loaders are pure functions of (seed, step)."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caravan.data.loader import (
    ExampleLoader,
    PretrainLoader,
    RankingLoader,
    example_batches,
    group_batches,
    shard_batches,
)
from caravan.data.permute import feistel, mix
from caravan.data.render import Rendered
from caravan.data.shards import Shards
from caravan.types import UserError


def toy_shards(sizes: list[int]) -> Shards:
    """Tokens count up from 1, so that each is the next one's neighbour; documents of the given sizes."""
    ends = np.cumsum(sizes)
    return Shards(np.arange(1, int(ends[-1]) + 1, dtype=np.uint16), ends, 1 << 16, 0)


sizes = st.lists(st.integers(2, 30), min_size=2, max_size=20)


@settings(deadline=None)
@given(sizes, st.integers(2, 16), st.integers(1, 80), st.integers(1, 80), st.integers(0, 9))
def test_rows_predict_the_next_token_of_the_document(docs, length, batch, micro, seed) -> None:
    shards = toy_shards(docs)
    loader = PretrainLoader(shards, batch, length, seed)
    last_of_document = {int(e) for e in shards.ends}
    for step in (0, 3):
        batches = loader.micro_batches(step, micro)
        for b in batches:
            assert sum(b.lengths) == len(b.ids_N) <= max(micro, loader.sequence_length)
            assert b.pos_N.tolist() == [i for n in b.lengths for i in range(n)]
            got = zip(b.ids_N.tolist(), b.targets_N.tolist(), b.weight_N.tolist(), strict=True)
            for token, *rest in got:
                assert rest == ([0, 0.0] if token in last_of_document else [token + 1, 1.0])
        assert loader.normaliser(step) == max(1.0, sum(float(b.weight_N.sum()) for b in batches))


def test_an_epoch_sees_every_row_once() -> None:
    shards = toy_shards([10] * 30)
    loader = PretrainLoader(shards, 50, 10, seed=4)
    assert (loader.rows, loader.steps_per_epoch) == (30, 6)
    seen = [t for s in range(6) for b in loader.micro_batches(s, 20) for t in b.ids_N.tolist()]
    assert sorted(seen) == list(range(1, 301)) and seen != sorted(seen)
    second = [t for s in range(6, 12) for b in loader.micro_batches(s, 20) for t in b.ids_N.tolist()]
    assert sorted(second) == list(range(1, 301)) and second != seen


def test_micro_batch_size_changes_only_the_cuts() -> None:
    loader = PretrainLoader(toy_shards([10] * 30), 60, 10, seed=4)
    flat = [[t for b in loader.micro_batches(2, m) for t in b.ids_N.tolist()] for m in (10, 20, 60, 7)]
    assert all(f == flat[0] for f in flat)


def test_resuming_is_asking_for_the_step() -> None:
    shards = toy_shards([7] * 40)
    ran = PretrainLoader(shards, lambda s: 20 + 10 * s, 10, seed=1)
    for step in range(8):
        expected = ran.micro_batches(step, 30)
    fresh = PretrainLoader(shards, lambda s: 20 + 10 * s, 10, seed=1).micro_batches(7, 30)
    assert [b.ids_N.tolist() for b in fresh] == [b.ids_N.tolist() for b in expected]


def test_ramp_takes_what_it_says_and_skips_nothing() -> None:
    loader = PretrainLoader(toy_shards([10] * 6), lambda s: 10 * (s + 1), 10)
    steps = [[t for b in loader.micro_batches(s, 99) for t in b.ids_N.tolist()] for s in range(3)]
    assert [len(s) for s in steps] == [10, 20, 30]
    assert sorted(t for s in steps for t in s) == list(range(1, 61))
    assert loader.steps_per_epoch == 3


def test_no_text_is_said() -> None:
    empty = Shards(np.zeros(0, np.uint16), np.zeros(0, np.int64), 9, 0)
    with pytest.raises(UserError, match="no text"):
        PretrainLoader(empty, 10, 10)
    with pytest.raises(UserError, match="no examples"):
        ExampleLoader([], 10)


def test_heldout_text_is_read_once_in_order() -> None:
    shards = toy_shards([10, 7, 8])
    batches = list(shard_batches(shards, 12, 6))
    assert [t for b in batches for t in b.ids_N.tolist()] == list(range(1, 26))
    assert sum(float(b.weight_N.sum()) for b in batches) == 25 - 3
    assert [len(b.ids_N) for b in batches] == [12, 12, 1]
    assert sum(len(b.ids_N) for b in shard_batches(shards, 12, 6, max_tokens=9)) == 9


def examples_of(lengths: list[int]) -> list[Rendered]:
    """Example i is the token i, n times."""
    return [Rendered([i] * n, [i % 2 == 0] + [True] * (n - 1)) for i, n in enumerate(lengths)]


lengths = st.lists(st.integers(2, 40), min_size=1, max_size=50)


@settings(deadline=None)
@given(lengths, st.integers(1, 120), st.integers(1, 60), st.integers(0, 9))
def test_every_example_once_an_epoch_and_no_empty_batch(sizes, batch, micro, seed) -> None:
    loader = ExampleLoader(examples_of(sizes), batch, seed)
    for epoch in (0, 1):
        seen: Counter[int] = Counter()
        for step in range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch):
            batches = loader.micro_batches(step, micro)
            assert batches and loader.normaliser(step) == sum(float(b.weight_N.sum()) for b in batches)
            for b in batches:
                assert float(b.weight_N.sum()) > 0
                assert len(b.ids_N) <= micro or len(b.lengths) == 1
                seen.update(b.ids_N[b.pos_N == 0].tolist())
        assert seen == Counter(range(len(sizes)))


def test_steps_hold_about_the_batch() -> None:
    loader = ExampleLoader(examples_of([10] * 100), 100, 3)
    assert loader.steps_per_epoch == 10
    assert all(sum(len(b.ids_N) for b in loader.micro_batches(s, 100)) == 100 for s in range(10))


def test_same_question_same_batch() -> None:
    a = ExampleLoader(examples_of([3, 5, 7, 9] * 9), 40, 2)
    b = ExampleLoader(examples_of([3, 5, 7, 9] * 9), 40, 2)
    for step in (5, 0, 11):
        assert [x.ids_N.tolist() for x in a.micro_batches(step, 16)] == [
            x.ids_N.tolist() for x in b.micro_batches(step, 16)
        ]
    other = ExampleLoader(examples_of([3, 5, 7, 9] * 9), 40, 3)
    assert [x.ids_N.tolist() for x in a.micro_batches(0, 16)] != [
        x.ids_N.tolist() for x in other.micro_batches(0, 16)
    ]


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(2, 9), min_size=2, max_size=4), min_size=1, max_size=20), st.integers(1, 60)
)
def test_groups_stay_together(groups: list[list[int]], micro: int) -> None:
    data = [examples_of(g) for g in groups]
    loader = RankingLoader(data, 50, seed=1)
    seen: list[int] = []
    for step in range(loader.steps_per_epoch):
        batches = loader.micro_batches(step, micro)
        assert loader.normaliser(step) == sum(len(b.groups) for b in batches) > 0
        for b in batches:
            assert sum(b.groups) == len(b.lengths)
            assert list(b.lengths) == [n for g in b.index for n in groups[g]]
            seen += b.index
    assert sorted(seen) == list(range(len(groups)))
    assert sorted(i for b in group_batches(data, micro) for i in b.index) == list(range(len(groups)))


def test_heldout_examples_all_come() -> None:
    batches = list(example_batches(examples_of([5, 9, 3]), 8))
    assert sorted(n for b in batches for n in b.lengths) == [3, 5, 9]


def test_one_source_is_read_in_the_order_of_the_cipher() -> None:
    """Worked out from the formula in the docs: artefacts made before must come out again."""
    loader = PretrainLoader(toy_shards([10] * 30), 60, 10, seed=4)
    got = [t // 10 for s in range(7) for b in loader.micro_batches(s, 60) for t in b.ids_N.tolist()[::10]]
    order = [feistel(np.arange(30), 30, mix(4, epoch)) for epoch in (0, 1)]
    assert got == np.concatenate(order)[:42].tolist()


@settings(deadline=None)
@given(sizes, st.integers(2, 16), st.sampled_from(["best_fit", "document"]), st.integers(0, 9))
def test_packed_documents_stay_whole_and_each_comes_once(docs, length, packing, seed) -> None:
    shards = toy_shards(docs)
    loader = PretrainLoader(shards, 3 * length, length, seed, packing=packing)
    pieces = sorted((a, b) for row in range(loader.rows) for _, a, b in loader.sources[0].pieces(row))
    assert [a for a, _ in pieces] == [0, *(b for _, b in pieces[:-1])] and pieces[-1][1] == len(shards)
    begins = {0, *(int(e) for e in shards.ends[:-1])}
    for a, b in pieces:
        owner = int(np.searchsorted(shards.ends, a, side="right"))
        begin, end = max(x for x in begins if x <= a), int(shards.ends[owner])
        assert (a - begin) % length == 0 and b == min(end, a + length), "cut only where it must be"
    for step in (0, 1):
        batches = loader.micro_batches(step, 2 * length)
        assert loader.normaliser(step) == max(1.0, sum(float(b.weight_N.sum()) for b in batches))
        for b in batches:
            assert len(b.ids_N) <= 2 * length and b.pos_N.tolist() == [i for n in b.lengths for i in range(n)]
            last = {int(e) for e in shards.ends}
            for token, target, weight in zip(b.ids_N.tolist(), b.targets_N.tolist(), b.weight_N, strict=True):
                assert (target, float(weight)) == ((0, 0.0) if token in last else (token + 1, 1.0))


def test_packings_differ_in_what_they_leave_empty() -> None:
    rng = np.random.default_rng(1)
    shards = toy_shards([int(n) for n in rng.integers(2, 60, 400)])
    rows = {p: PretrainLoader(shards, 640, 64, packing=p).rows for p in ("chunk", "best_fit", "document")}
    assert rows["chunk"] <= rows["best_fit"] <= 1.05 * rows["chunk"] and rows["document"] == 400
