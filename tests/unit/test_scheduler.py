"""The scheduler without a model: a counter stands in for the sampler."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caravan.engine.scheduler import Plan, Request, Scheduler
from caravan.types import UserError


def make(blocks: int = 8, size: int = 4, seqs: int = 3, budget: int = 12, context: int = 24) -> Scheduler:
    return Scheduler(blocks=blocks, block_size=size, max_seqs=seqs, step_tokens=budget, max_context=context)


def check(s: Scheduler, requests: Sequence[Request], plan: Plan | None = None) -> None:
    """The invariants of the design, after any step."""
    pool, size = s.pool, s.block_size
    refs = [0] * len(pool.blocks)
    for r in s.running:
        for b in r.blocks:
            refs[b] += 1
        assert len(set(r.blocks)) == len(r.blocks)
        assert r.computed <= len(r.blocks) * size
        assert 0 <= r.computed <= len(r.tokens)
        assert r.cached <= len(r.tokens) - 1
        assert r.published * size <= r.computed
    assert refs == [b.ref for b in pool.blocks]
    assert set(pool.free_ids()) == {b.id for b in pool.blocks if b.ref == 0}
    assert all(pool.blocks[i].hash == h for h, i in pool.by_hash.items())
    assert all(not r.blocks and r.computed == 0 for r in s.waiting)
    assert len(s.running) <= s.max_seqs
    owners = {r.id for r in s.running}
    assert set(s.pending.values()) <= owners
    if plan is not None:
        assert sum(row.n for row in plan.rows) <= s.step_tokens
        assert len({row.request.id for row in plan.rows}) == len(plan.rows)
        for row in plan.rows:
            assert row.n > 0 and row.start + row.n <= len(row.request.blocks) * size
        assert not (plan.preempted and plan.admitted)


def advance(s: Scheduler, requests: Sequence[Request], token: int = 7) -> Plan:
    lacking_one = {r.id for r in s.running if r.missing == 1}
    plan = s.plan()
    check(s, requests, plan)
    assert plan.rows or not s.busy, "nobody can go on"
    gone = {r.id for r in plan.preempted}
    assert lacking_one - gone <= {row.request.id for row in plan.rows}, "a decode was starved"
    tables = {row.request.id: list(row.request.blocks) for row in plan.rows}
    s.apply(plan, [token] * sum(row.sample for row in plan.rows))
    for row in plan.rows:
        r = row.request
        assert r.blocks[: len(tables[r.id])] == tables[r.id]
        if len(r.tokens) - r.n_prompt >= r.max_new:
            s.finish(r)
    check(s, requests)
    return plan


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_invariants_hold_for_any_workload(data: st.DataObject) -> None:
    s = make(blocks=data.draw(st.integers(3, 12)), budget=data.draw(st.integers(7, 20)))
    requests: list[Request] = []
    refused = 0
    for _ in range(data.draw(st.integers(1, 25))):
        move = data.draw(st.sampled_from(["add", "step", "step", "step", "abort", "weights"]))
        if move == "add":
            # few distinct tokens, so that prefixes are often shared
            prompt = [1] * data.draw(st.integers(0, 14)) + data.draw(st.lists(st.integers(1, 2), max_size=12))
            new = data.draw(st.integers(1, 10))
            try:
                requests.append(s.add(prompt, new, share_output=data.draw(st.booleans())))
            except UserError:
                refused += 1
        elif move == "abort" and requests:
            s.finish(data.draw(st.sampled_from(requests)))
        elif move == "weights":
            s.update_weights(len(requests))
        else:
            advance(s, requests)
        check(s, requests)
    for _ in range(500):
        if not s.busy:
            break
        advance(s, requests)
    assert not s.busy, "the workload never ends"
    assert s.pool.owned_count == 0 and s.counts.refused == refused


def test_prompt_is_cut_at_block_boundaries_and_decodes_come_first() -> None:
    s = make(blocks=20, budget=7)
    first = s.add([1, 2], 5)
    advance(s, [first])
    second = s.add(list(range(11)), 3)
    plan = advance(s, [first, second])
    assert [(row.request.id, row.n, row.sample) for row in plan.rows] == [(0, 1, True), (1, 4, False)]
    plan = advance(s, [first, second])
    assert [(row.start, row.n, row.sample) for row in plan.rows] == [(3, 1, True), (4, 4, False)]
    plan = advance(s, [first, second])
    assert [(row.start, row.n, row.sample) for row in plan.rows] == [(4, 1, True), (8, 3, True)]


def test_what_must_not_be_cut_is_computed_at_once() -> None:
    s = make(blocks=20, budget=8)
    first, second = s.add([1] * 6, 1, prefix=5), s.add(list(range(15)), 1, prefix=14)
    third = s.add(list(range(20, 35)), 1, prefix=2)
    plan = s.plan()
    assert [(row.request, row.n) for row in plan.rows] == [(first, 6), (second, 14)], (
        "14 exceeds what is left"
    )
    s.apply(plan, [7])
    s.finish(first)
    assert [(row.request, row.start, row.n) for row in s.plan().rows] == [(second, 14, 1), (third, 0, 4)]


def test_another_regime_starts_again() -> None:
    s = Scheduler(
        blocks=20, block_size=4, max_seqs=2, step_tokens=8, max_context=40, regime=lambda n: int(n > 10)
    )
    request = s.add(list(range(9)), 4)
    rows = []
    while len(request.tokens) < 13:
        plan = s.plan()
        check(s, [request])
        rows += [(row.start, row.n) for row in plan.rows]
        s.apply(plan, [7] * sum(row.sample for row in plan.rows))
        check(s, [request])
    assert rows == [(0, 8), (8, 1), (9, 1), (0, 11), (11, 1)]


def test_samples_of_one_prompt_cost_one_prefill() -> None:
    s = make(blocks=40, seqs=4, budget=64)
    group = [s.add(list(range(10)), 2) for _ in range(4)]
    first = advance(s, group)
    assert [row.n for row in first.rows] == [10]
    second = advance(s, group)
    assert sorted(row.n for row in second.rows) == [1, 2, 2, 2]
    assert s.counts.cached_tokens == 3 * 8 and s.counts.computed_tokens == 10 + 7


def test_last_token_of_a_cached_prompt_is_computed() -> None:
    s = make(blocks=40)
    a = s.add(list(range(8)), 1)
    advance(s, [a])
    b = s.add(list(range(8)), 1)
    plan = advance(s, [a, b])
    assert [(row.start, row.n) for row in plan.rows] == [(4, 4)]


def test_new_weights_find_nothing_old() -> None:
    s = make(blocks=40)
    prompt = list(range(9))
    advance(s, [s.add(prompt, 1)])
    s.update_weights(1)
    again = s.add(prompt, 1)
    plan = advance(s, [again])
    assert again.cached == 0 and plan.rows[0].n == 9


def test_running_request_does_not_publish_after_an_update() -> None:
    s = make(blocks=40, budget=8)
    r = s.add(list(range(14)), 1)
    advance(s, [r])
    s.update_weights(1)
    known = set(s.pool.by_hash)
    while s.busy:
        advance(s, [r])
    assert set(s.pool.by_hash) == known


def test_youngest_is_preempted_and_ends_as_it_would_have() -> None:
    s = make(blocks=4, size=4, seqs=2, budget=12, context=16)
    a, b = s.add([1] * 5, 8), s.add([2] * 5, 8)
    steps = 0
    while s.busy:
        advance(s, [a, b])
        steps += 1
    assert b.preemptions > 0 and a.preemptions == 0
    assert len(a.tokens) == len(b.tokens) == 13
    assert steps < 40


def test_what_never_fits_is_refused_with_numbers() -> None:
    s = make(blocks=2, size=4, context=100)
    with pytest.raises(UserError, match="need 10 cache positions and there are 8"):
        s.add([1] * 4, 6)
    with pytest.raises(UserError, match="100 tokens and the context holds 100"):
        s.add([1] * 100, 1)
    with pytest.raises(UserError, match="empty"):
        s.add([], 1)
    assert not s.busy and s.counts.refused == 3


def test_answer_is_cut_to_the_context() -> None:
    s = make(blocks=20, context=10)
    assert s.add([1] * 7, 50).max_new == 3


def test_salts_do_not_share() -> None:
    s = make(blocks=40)
    advance(s, [s.add(list(range(9)), 1, salt="a")])
    other = s.add(list(range(9)), 1, salt="b")
    advance(s, [other])
    assert other.cached == 0
