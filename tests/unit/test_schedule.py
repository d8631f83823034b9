"""Learning-rate shapes at points worked out by hand."""

import itertools

import pytest

from caravan.algos.schedule import Schedule, batch_tokens_at, lr_at


def rates(steps=10, **fields):
    return [lr_at(s, steps, 1.0, Schedule(**fields)) for s in range(steps)]


def test_warmup_rises_linearly_to_the_peak():
    assert rates(kind="constant", warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_falls_towards_the_final_ratio_and_never_rises_after_warmup(kind):
    values = rates(steps=50, kind=kind, warmup_steps=5, final_ratio=0.1)
    assert 0.1 < values[-1] < 0.15
    assert lr_at(50, 50, 1.0, Schedule(kind=kind, warmup_steps=5, final_ratio=0.1)) == pytest.approx(0.1)
    assert max(values) == 1.0
    assert all(a >= b for a, b in itertools.pairwise(values[4:]))


def test_cosine_is_halfway_in_the_middle():
    assert lr_at(50, 100, 2.0, Schedule(kind="cosine", final_ratio=0.0)) == pytest.approx(1.0)


def test_linear_to_zero_wastes_no_step():
    assert rates(steps=4, kind="linear", final_ratio=0.0) == [1.0, 0.75, 0.5, 0.25]


def test_wsd_is_flat_until_the_decay():
    values = rates(steps=10, kind="wsd", decay_share=0.4, final_ratio=0.0)
    assert values[:7] == [1.0] * 7
    assert values[7] == pytest.approx(1 - 0.25**0.5)
    assert values[9] == pytest.approx(1 - 0.75**0.5)


def test_one_step_runs_have_a_rate():
    for kind in ("cosine", "linear", "wsd", "constant"):
        assert 0 < lr_at(0, 1, 1.0, Schedule(kind=kind, warmup_steps=1)) <= 1.0


def test_batch_ramp():
    assert batch_tokens_at(0, 1000, 10) == 250
    assert batch_tokens_at(5, 1000, 10) == 625
    assert batch_tokens_at(10, 1000, 10) == batch_tokens_at(99, 1000, 0) == 1000
