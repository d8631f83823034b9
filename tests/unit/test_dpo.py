"""DPO at points worked out by hand."""

import math

import pytest
import torch

from caravan.algos.preference import dpo


def _loss(pc, pr, fc, fr, **kw):
    args = [torch.tensor(x, dtype=torch.float64) for x in (pc, pr, fc, fr)]
    return dpo.loss(*args, len(pc), **{"beta": 0.1, **kw})


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_ln_2_while_policy_is_reference(smoothing: float) -> None:
    loss = _loss([-30.0, -4.0], [-7.0, -90.0], [-30.0, -4.0], [-7.0, -90.0], label_smoothing=smoothing)
    assert float(loss.value) == pytest.approx(dpo.FIRST_LOSS, abs=1e-12) == pytest.approx(math.log(2))
    assert float(loss.stats["accuracy"]) == 0.5 and float(loss.stats["margin"]) == 0.0


def test_value_and_stats_by_hand() -> None:
    loss = _loss([-10.0], [-12.0], [-11.0], [-10.0], beta=0.5)
    h = (-10 + 12) - (-11 + 10)
    assert float(loss.value) == pytest.approx(math.log(1 + math.exp(-0.5 * h)))
    assert float(loss.stats["reward_chosen"]) == pytest.approx(0.5)
    assert float(loss.stats["reward_rejected"]) == pytest.approx(-1.0)
    assert float(loss.stats["margin"]) == pytest.approx(1.5)
    assert float(loss.stats["accuracy"]) == 1.0


def test_smoothed_labels_have_a_finite_optimum() -> None:
    """cDPO at eps = 0.1: the gradient vanishes at beta h = log 9."""
    x = torch.tensor([2.197225 / 0.1], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    dpo.loss(x, zero, zero, zero, 1, beta=0.1, label_smoothing=0.1).value.backward()
    assert abs(x.grad.item()) < 1e-7


def test_extreme_margins_are_finite() -> None:
    x = torch.tensor([1e5, -1e5], requires_grad=True)
    zero = torch.zeros(2)
    loss = dpo.loss(x, zero, zero, zero, 2, beta=1.0, label_smoothing=0.1)
    loss.value.backward()
    assert torch.isfinite(loss.value) and torch.isfinite(x.grad).all()


def test_micro_batches_add_up() -> None:
    g = torch.Generator().manual_seed(1)
    four = [torch.randn(5, generator=g, dtype=torch.float64) for _ in range(4)]
    whole = dpo.loss(*four, 5, beta=0.3)
    parts = [dpo.loss(*(x[a:b] for x in four), 5, beta=0.3) for a, b in ((0, 2), (2, 5))]
    assert float(whole.value) == pytest.approx(sum(float(p.value) for p in parts))
    for name, value in whole.stats.items():
        assert float(value) == pytest.approx(sum(float(p.stats[name]) for p in parts)), name
