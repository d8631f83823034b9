"""Ranking losses at points where the answer is known, and the measures that describe a reward model."""

import math

import pytest
import torch

from caravan.algos import reward as R


def test_loss_at_equal_scores_is_ln_2_and_ln_k() -> None:
    assert float(R.pairwise_loss(torch.zeros(3), 3).value) == pytest.approx(math.log(2))
    assert float(R.softmax_loss(torch.zeros(4), [[0, 1, 2, 3]], 1).value) == pytest.approx(1.386294, abs=1e-6)


@pytest.mark.parametrize(("gap", "minimum"), [(1.0, 0.582203), (2.0, 0.365334)])
def test_soft_labels_recover_the_true_difference(gap: float, minimum: float) -> None:
    """Bradley-Terry with the true probability as label: the minimum is the entropy, at the true
    difference."""
    d = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    target = 1 / (1 + math.exp(-gap))
    for _ in range(400):
        (g,) = torch.autograd.grad(R.pairwise_loss(d, 1, target=target).value, d)
        d = (d - 2.0 * g).detach().requires_grad_()
    assert d.item() == pytest.approx(gap, abs=1e-6)
    assert R.pairwise_loss(d, 1, target=target).value.item() == pytest.approx(minimum, abs=1e-6)


def test_twenty_per_cent_wrong_labels_give_log_4() -> None:
    target = torch.tensor([1.0] * 8 + [0.0] * 2, dtype=torch.float64)
    x = torch.tensor(math.log(4), dtype=torch.float64, requires_grad=True)
    R.pairwise_loss(x.expand(10), 10, target=target).value.backward()
    assert float(x.grad) == pytest.approx(0.0, abs=1e-12)


def test_extreme_differences_and_margin() -> None:
    d = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = R.pairwise_loss(d, 2)
    loss.value.backward()
    assert torch.isfinite(loss.value) and torch.isfinite(d.grad).all()
    assert float(R.pairwise_loss(torch.tensor([2.0]), 1, margin=2.0).value) == pytest.approx(math.log(2))


def test_all_pairs_of_a_prompt_count_as_one() -> None:
    """K = 3 gives 3 pairs of weight 1/3; ties none; a prompt of ties only does not count."""
    pairs = R.ranked_pairs([[1, 0, 2], [0, 1], [0, 0]])
    assert list(zip(pairs.better, pairs.worse, strict=True)) == [(0, 2), (1, 0), (1, 2), (3, 4)]
    assert pairs.weight == pytest.approx((1 / 3, 1 / 3, 1 / 3, 1.0))
    assert pairs.prompts == 2
    score = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.0, 5.0, 5.0])
    d = score[list(pairs.better)] - score[list(pairs.worse)]
    loss = R.pairwise_loss(d, pairs.prompts, weight_P=torch.tensor(pairs.weight))
    by_hand = -(
        sum(math.log(1 / (1 + math.exp(-x))) for x in (1.0, 1.0, 2.0)) / 3 + math.log(1 / (1 + math.exp(-2)))
    )
    assert float(loss.value) == pytest.approx(by_hand / 2)
    assert float(loss.stats["accuracy"]) == pytest.approx(1.0)


def test_softmax_of_two_is_the_pairwise_loss_and_ties_share() -> None:
    score = torch.tensor([0.3, -1.1], dtype=torch.float64)
    assert float(R.softmax_loss(score, [[0, 1]], 1).value) == pytest.approx(
        float(R.pairwise_loss(score[:1] - score[1:], 1).value)
    )
    assert float(R.softmax_loss(torch.zeros(3), [[0, 0, 1]], 1).value) == pytest.approx(math.log(3))


def test_centring_loss() -> None:
    assert float(R.centring_loss(torch.tensor([1.0, -3.0]), 2, 0.1)) == pytest.approx(0.5)


def test_accuracy_counts_a_tie_half() -> None:
    assert R.accuracy(torch.tensor([1.0, -1.0, 0.0, 2.0])) == pytest.approx(0.625)


def test_calibration_of_a_calibrated_and_an_overconfident_model() -> None:
    g = torch.Generator().manual_seed(0)
    d = torch.randn(20_000, generator=g) * 2
    right = torch.rand(20_000, generator=g) < torch.sigmoid(d.abs())
    true = torch.where(right, d.abs(), -d.abs())
    ece, table = R.calibration(true)
    assert ece < 0.01
    assert sum(row["n"] for row in table) == 20_000
    assert R.calibration(true * 3)[0] > 0.08


def test_length_bias_of_a_model_that_counts_tokens() -> None:
    lengths = torch.tensor([3.0, -2.0, 5.0, -1.0])
    bias = R.length_bias(lengths * 0.5, lengths)
    assert bias["correlation"] == pytest.approx(1.0)
    assert (bias["accuracy_shorter"], bias["accuracy_longer"]) == (0.0, 1.0)
    assert (bias["pairs_shorter"], bias["pairs_longer"]) == (2, 2)
    turned = R.length_bias(-lengths * 0.5, -lengths)
    assert turned["correlation"] == pytest.approx(1.0)
    assert R.length_bias(torch.zeros(2), torch.ones(2))["correlation"] == 0.0
