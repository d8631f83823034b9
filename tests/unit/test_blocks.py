"""The block pool under random sequences of operations."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caravan.engine.blocks import BlockPool, chain, root


def check(pool: BlockPool, owned: dict[int, int]) -> None:
    free = pool.free_ids()
    assert len(free) == len(set(free)) == pool.free_count
    assert set(free) == {b.id for b in pool.blocks if b.ref == 0}
    assert {b.id: b.ref for b in pool.blocks if b.ref} == owned
    assert pool.free_count + pool.owned_count == len(pool.blocks)
    for block in pool.blocks:
        assert block.hash is None or pool.lookup(block.hash) == block.id
    assert all(pool.blocks[i].hash == h for h, i in pool.by_hash.items())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.lists(st.tuples(st.sampled_from("aftp"), st.integers(0, 99)), max_size=60))
def test_any_sequence_keeps_every_block_in_one_place(count: int, moves: list[tuple[str, int]]) -> None:
    pool = BlockPool(count)
    owned: dict[int, int] = {}
    for kind, x in moves:
        if kind == "a":
            want = x % (count + 2)
            got = pool.alloc(want)
            assert (got is None) == (want > count - len(owned))
            owned.update(dict.fromkeys(got or [], 1))
        elif kind == "t":
            pool.touch([x % count])
            owned[x % count] = owned.get(x % count, 0) + 1
        elif owned:
            block = sorted(owned)[x % len(owned)]
            if kind == "f":
                pool.free([block])
                owned[block] -= 1
                if not owned[block]:
                    del owned[block]
            elif pool.blocks[block].hash is None:
                pool.publish(block, chain(root(0), [x % 3]))
        check(pool, owned)


def test_tail_of_a_sequence_is_evicted_before_its_head() -> None:
    pool = BlockPool(4)
    ids = pool.alloc(4)
    assert ids is not None
    pool.free(ids)
    assert pool.free_ids() == ids[::-1]


def test_freed_block_is_found_until_it_is_given_away() -> None:
    pool = BlockPool(2)
    h = chain(root(0), [1, 2])
    (a,) = pool.alloc(1) or ()
    assert pool.publish(a, h)
    pool.free([a])
    assert pool.lookup(h) == a
    pool.touch([a])
    pool.free([a])
    assert pool.alloc(2) is not None
    assert pool.lookup(h) is None


def test_twin_stays_private() -> None:
    pool = BlockPool(2)
    a, b = pool.alloc(2) or ()
    h = chain(root(0), [1])
    assert pool.publish(a, h) and not pool.publish(b, h)
    assert pool.lookup(h) == a and pool.blocks[b].hash is None


def test_hash_depends_on_everything_before_and_on_the_root() -> None:
    tokens = [1, 2, 3]
    assert chain(chain(root(0), [9]), tokens) != chain(root(0), tokens)
    assert len({root(0), root(1), root("0"), root(0, "tenant")}) == 4


def test_double_free_is_a_programmers_mistake() -> None:
    pool = BlockPool(1)
    ids = pool.alloc(1) or []
    pool.free(ids)
    with pytest.raises(AssertionError):
        pool.free(ids)
