"""Shares that come out exactly, spread evenly, for any row in no time."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caravan import stage
from caravan.cli.running import take
from caravan.data import mix
from caravan.data.loader import PretrainLoader
from caravan.data.mix import Phase, Timetable, apportion, parse, temperature, token_shares
from caravan.data.shards import Shards
from caravan.types import UserError

counts = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)


@given(counts)
def test_a_timetable_reads_every_row_of_every_source_once_and_evenly(wanted: list[int]) -> None:
    total = sum(wanted)
    table = Timetable([wanted])
    owner, number = table.of(0, total)
    for s, count in enumerate(wanted):
        assert number[owner == s].tolist() == list(range(count)), "each once, in order"
    for row in range(total + 1):
        so_far = np.bincount(owner[:row], minlength=len(wanted))
        assert table.counts(row) == tuple(so_far)
        ideal = np.asarray(wanted) * row / total
        assert np.abs(so_far - ideal).max() <= (len(wanted) - 1) / 2 + 1e-9


@given(st.lists(counts, min_size=2, max_size=4), st.integers(0, 200), st.integers(0, 30))
def test_any_row_is_found_without_those_before(phases: list[list[int]], start: int, length: int) -> None:
    width = max(map(len, phases))
    phases = [p + [0] * (width - len(p)) for p in phases]
    table, stop = Timetable(phases), start + length
    owner, number = table.of(0, stop)
    there, how_many = table.of(start, stop)
    assert (there.tolist(), how_many.tolist()) == (owner[start:].tolist(), number[start:].tolist())
    at = 0
    for phase in phases:  # every phase has what it was promised
        inside = owner[at : at + sum(phase)]
        if len(inside) == sum(phase):
            assert np.bincount(inside, minlength=width).tolist() == phase
        at += sum(phase)


def test_rows_are_exact_where_products_leave_64_bits() -> None:
    big = [7 * 10**11, 3 * 10**11]
    owner, number = Timetable([big]).of(10**12 - 10, 10**12)
    assert Counter(owner.tolist()) == {0: 7, 1: 3} and number.max() == big[0] - 1


def test_two_sources_by_hand() -> None:
    owner, number = Timetable([[3, 1]]).of(0, 8)
    assert owner.tolist() == [0, 1, 0, 0] * 2 or owner.tolist() == [0, 0, 1, 0] * 2
    assert number.tolist() == ([0, 0, 1, 2, 3, 1, 4, 5] if owner[1] else [0, 1, 0, 2, 3, 4, 1, 5])


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8).filter(any), st.integers(0, 10**6))
def test_largest_remainders(weights: list[float], total: int) -> None:
    got = apportion(weights, total)
    assert sum(got) == total
    assert all(abs(n - w * total / math.fsum(weights)) < 1 + 1e-6 for n, w in zip(got, weights, strict=True))
    assert apportion([1, 1, 1], 2) == (1, 1, 0)


def test_temperature_and_epochs() -> None:
    assert temperature([900, 100], 1) == pytest.approx((0.9, 0.1))
    assert temperature([900, 100], 0) == pytest.approx((0.5, 0.5))
    assert temperature([900, 100], 0.5) == pytest.approx((0.75, 0.25))
    assert token_shares([1, 4], [90, 10], "epochs") == pytest.approx((90 / 130, 40 / 130))
    assert token_shares([3, 1], [90, 10], "proportion") == pytest.approx((0.75, 0.25))


def test_phases_are_read() -> None:
    assert parse(["3,1"], 2, 0.2) == [Phase(1, (3, 1))]
    first, last = parse(["0.7:3,1", "0.3:1,4"], 2, 0.2)
    assert (first, last) == (Phase(0.7, (3, 1)), Phase(0.3, (1, 4)))
    assert parse(["3,1", "anneal:0,1"], 2, 0.2) == [Phase(0.8, (3, 1)), Phase(0.2, (0, 1))]


@pytest.mark.parametrize(
    ("texts", "says"),
    [(["3"], "1 weights for 2"), (["a,b"], "cannot be read"), (["0,0"], "not all 0"), (["-1,2"], "from 0 on"),
     (["inf,1"], "from 0 on"), (["0.5:1,1"], "cover 0.5"), (["0.5:1,1", "0.6:1,1"], "cover 1.1"),
     (["1,1", "1,1"], "cover"), (["anneal:1,1", "1,1"], "must be the last"), (["2:1,1"], "at most 1"),
     (["x:1,1"], "cannot be read")],
)  # fmt: skip
def test_what_cannot_be_a_phase_is_said(texts: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse(texts, 2, 0.2)


def toy(start: int, documents: int, size: int) -> Shards:
    """Tokens count up from `start`, so each tells its source and place."""
    ends = np.arange(1, documents + 1) * size
    return Shards(np.arange(start, start + documents * size, dtype=np.uint32), ends, 10**6, 0)


A, B, C = toy(1, 50, 8), toy(10_001, 20, 8), toy(20_001, 30, 8)
PHASES = [Phase(0.5, (2, 1, 1)), Phase(0.5, (0, 1, 3))]


def loader(packing: str = "chunk", **given: object) -> PretrainLoader:
    batch = given.pop("batch", 160)
    return PretrainLoader(
        [A, B, C], batch, 16, 3, packing=packing, phases=PHASES, steps=10, **given  # type: ignore[arg-type]
    )  # fmt: skip


def source_of(token: int) -> int:
    return token // 10_000


@pytest.mark.parametrize("packing", ["chunk", "best_fit", "document"])
def test_what_is_read_is_what_is_reported(packing: str) -> None:
    run = loader(packing)
    seen: Counter[int] = Counter()
    for step in range(10):
        ids = [t for b in run.micro_batches(step, 32) for t in b.ids_N.tolist()]
        found = Counter(map(source_of, ids))
        assert run.tokens_of(step) == [found[k] for k in range(3)]
        assert run.normaliser(step) == sum(float(b.weight_N.sum()) for b in run.micro_batches(step, 99))
        seen += found
    assert run.tokens_read(10) == [seen[k] for k in range(3)]
    first, second = run.tokens_read(5), run.tokens_read(10, 5)
    size = 16 if packing != "document" else 8
    assert second[0] == 0 and sum(first) + sum(second) == 100 * size
    assert np.abs(np.asarray(first) / sum(first) - [0.5, 0.25, 0.25]).max() <= size / sum(first)
    assert np.abs(np.asarray(second) / sum(second) - [0, 0.25, 0.75]).max() <= size / sum(second)


def test_each_source_goes_through_its_own_epochs() -> None:
    """Source C has 15 rows: of the 50 it is read for, each comes three or four times."""
    run = loader()
    ids = [t for step in range(10) for b in run.micro_batches(step, 16) for t in b.ids_N.tolist()]
    times = Counter(t for t in ids if source_of(t) == 2)
    assert len(times) == 240 and max(times.values()) - min(times.values()) <= 1


@pytest.mark.parametrize("packing", ["chunk", "best_fit", "document"])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_order_is_that_of_one_process_whatever_the_ranks_and_the_moment(packing: str, world: int) -> None:
    whole = [b.ids_N.tolist() for step in range(10) for b in loader(packing).micro_batches(step, 16)]
    for start in (0, 7):
        got = []
        ranks = [loader(packing) for _ in range(world)]  # fresh: nothing but the step is known
        for step in range(start, 10):
            shares = [one.micro_batches(step, 16)[r::world] for r, one in enumerate(ranks)]
            got += [shares[k % world][k // world].ids_N.tolist() for k in range(sum(map(len, shares)))]
        assert got == whole[start * 10 :]


@pytest.mark.parametrize("packing", ["chunk", "best_fit", "document"])
def test_resume_at_any_token(packing: str) -> None:
    run = loader(packing)
    flat = [t for step in range(10) for b in run.micro_batches(step, 16) for t in b.ids_N.tolist()]
    end = len(flat)
    for start, stop in ((0, end), (1, 2), (15, 17), (333, 734), (end - 1, end), (40, 40), (end - 40, end)):
        assert loader(packing).stream(start, stop).tolist() == flat[start:stop]
    uneven = Shards(A.tokens, np.r_[9:400:9, 400], 10**6, 0)
    one = PretrainLoader(uneven, 48, 16, 3, packing=packing)  # type: ignore[arg-type]
    flat = [t for step in range(50) for b in one.micro_batches(step, 16) for t in b.ids_N.tolist()]
    assert len(flat) > 3 * one.sources[0].tokens, "several epochs"
    assert packing == "chunk" or len(flat) < 50 * 48, "rows that are not full"
    for start in range(0, len(flat) - 7, 83):
        assert one.stream(start, start + 7).tolist() == flat[start : start + 7]


@pytest.mark.parametrize("packing", ["chunk", "best_fit", "document"])
def test_resume_behind_any_row_at_another_batch_size(packing: str) -> None:
    def rows(run: PretrainLoader, steps: int) -> list[list[int]]:
        return [b.ids_N.tolist() for step in range(steps) for b in run.micro_batches(step, 16)]

    uneven = Shards(A.tokens, np.r_[9:400:9, 400], 10**6, 0)
    whole = rows(PretrainLoader(uneven, 160, 16, 3, packing=packing), 6)  # type: ignore[arg-type]
    assert len(whole) == 60 and (packing == "chunk" or len(set(map(len, whole))) > 1)
    later = PretrainLoader(uneven, 48, 16, 3, packing=packing, first_row=21)  # type: ignore[arg-type]
    assert rows(later, 13) == whole[21:]


def test_a_ramp_keeps_its_phases_at_steps() -> None:
    run = loader(batch=lambda step: 32 * (step + 1))
    assert run.tokens_read(10, 5)[0] == 0 and run.tokens_of(4)[0] > 0
    assert sum(run.tokens_read(10)) == 32 * 55


def test_sources_too_small_for_a_row_are_named() -> None:
    with pytest.raises(UserError, match="less than a row of 500"):
        PretrainLoader([A, B], 1000, 500)


def test_by_size_when_nothing_is_said() -> None:
    run = PretrainLoader([A, B], 560, 16, steps=10)
    assert run.tokens_read(10) == [4000, 1600]
    assert mix.ANNEAL == "anneal"


def test_a_flag_given_more_than_once_is_a_list_in_order() -> None:
    words = [w for k in range(12) for w in ("--shards", f"s{k}")]
    taken, rest = take([*words, "--size", "nano"], ["shards"], ["shards"])
    assert list(stage.series(taken, "shards")) == [f"s{k}" for k in range(12)]  # type: ignore[arg-type]
    assert rest == ["--size", "nano"] and stage.kinds("shards+") == ("shards",) and stage.many("shards+")
    assert stage.listed("shards", ["a", "b"]) == {"shards": "a", "shards.2": "b"}  # type: ignore[list-item]
    with pytest.raises(UserError, match="given twice"):
        take(words, ["shards"])


def test_weights_are_of_tokens_however_many_a_row_holds() -> None:
    """Documents of 4 and of 12 tokens, one to a row: equal shares need three rows of one to one of the
    other."""
    both = [toy(1, 50, 4), toy(10_001, 50, 12)]
    run = PretrainLoader(both, 64, 16, packing="document", phases=[Phase(1, (1, 1))], steps=10)
    assert run.tokens_read(10) == [30 * 4, 10 * 12]


@pytest.mark.parametrize("alpha", [-1.0, float("inf"), float("nan")])
def test_an_alpha_that_weighs_nothing(alpha: float) -> None:
    with pytest.raises(UserError, match="cannot be weighed"):
        temperature([10, 20], alpha)
