"""The quality classifier: its optimum, its calibration, and a draw whose rate is known in closed form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from caravan.data import quality
from caravan.data.signals import View
from caravan.types import UserError

DRAW = np.random.default_rng(0)
COMMON = [f"w{k}" for k in range(200)]
GOOD, RAW = [f"g{k}" for k in range(40)], [f"r{k}" for k in range(40)]


def text(kind: list[str], words: int = 60, share: float = 0.15) -> str:
    return " ".join(DRAW.choice(kind) if DRAW.random() < share else DRAW.choice(COMMON) for _ in range(words))


def corpus(count: int) -> tuple[quality.Counts, np.ndarray]:
    texts = [text(GOOD) for _ in range(count)] + [text(RAW) for _ in range(count)]
    return quality.counts(View(texts)), np.repeat([1, 0], count)


@pytest.mark.parametrize("alpha", [3.0, 9.0])
@pytest.mark.parametrize("score", [0.0, 0.5, 0.75, 0.9, 0.95, 1.0])
def test_keep_rate_equals_its_closed_form(score: float, alpha: float) -> None:
    """Against numpy's Pareto (which is Lomax) and against (2 - s)^-alpha, within four standard errors."""
    n = 40_000
    rate = quality.keep_rate(score, alpha)
    assert rate == pytest.approx((2 - score) ** -alpha)
    error = 4 * np.sqrt(rate * (1 - rate) / n) + 1e-12
    kept = quality.pareto_keeps([f"doc{k}" for k in range(n)], np.full(n, score), alpha)
    assert abs(kept.mean() - rate) < error
    drawn = np.random.default_rng(1).pareto(alpha, n) > 1 - score
    assert abs(drawn.mean() - rate) < error


def test_the_draw_is_a_function_of_id_and_seed() -> None:
    ids = [f"{k}" for k in range(500)]
    score = np.full(500, 0.9)
    kept = quality.pareto_keeps(ids, score, 9)
    assert (quality.pareto_keeps(ids[::-1], score, 9)[::-1] == kept).all()
    assert (quality.pareto_keeps(ids, score, 9, seed=1) != kept).any()
    assert (quality.pareto_keeps(ids, score + 0.05, 9) >= kept).all(), "a better score never hurts"


def test_counts_are_normalised_and_know_chinese() -> None:
    x = quality.counts(View(["a a b", "学而时习", "", "学 时"]))
    norms = np.bincount(x.row_Z, x.value_Z**2, 4)
    assert norms == pytest.approx([1, 1, 0, 1])
    assert np.bincount(x.row_Z, minlength=4).tolist() == [2, 7, 0, 2], "four characters and three pairs"
    assert x.value_Z[x.row_Z == 0].max() == pytest.approx((1 + np.log(2)) / np.hypot(1 + np.log(2), 1))
    assert set(x.column_Z[x.row_Z == 3]) < set(x.column_Z[x.row_Z == 1])


def test_counts_do_not_depend_on_neighbours() -> None:
    texts = [text(GOOD), "学而 abc", text(RAW)]
    together = quality.counts(View(texts))
    for row, alone in enumerate(texts):
        one = quality.counts(View([alone]))
        assert (together.column_Z[together.row_Z == row] == one.column_Z).all()
        assert (together.value_Z[together.row_Z == row] == one.value_Z).all()


def test_training_finds_the_optimum() -> None:
    """The gradient of the loss, written out here, is nothing at the solution."""
    x, label = corpus(40)
    model = quality.train(x, label, l2=1e-2, steps=200)
    share = np.where(label == 1, 0.5 / label.sum(), 0.5 / (1 - label).sum())
    pull = share * (1 / (1 + np.exp(-model.margin(x))) - label)
    slope = np.zeros(1 << quality.BITS)
    np.add.at(slope, x.column_Z, x.value_Z * pull[x.row_Z])
    assert np.abs(slope + 1e-2 * model.weight_F).max() < 2e-4 and abs(pull.sum()) < 2e-4


def test_a_classifier_that_is_calibrated_and_survives_the_disk(tmp_path: Path) -> None:
    x, label = corpus(150)
    model = quality.train(x, label, l2=1e-3, steps=100)
    between, last = corpus(100), corpus(150)
    better = quality.calibrated(model, *between)
    target = np.where(between[1] == 1, 101 / 102, 1 / 102)
    there = better.score(between[0]).astype(float)
    assert there.mean() == pytest.approx(target.mean(), abs=1e-4), "where Platt's loss is least"
    margin = better.margin(between[0])
    assert (there - target) @ margin / len(margin) == pytest.approx(0, abs=1e-3)
    score = better.score(last[0])
    assert quality.auc(score, last[1]) > 0.97
    assert quality.calibration_error(score, last[1]) < 0.06
    assert quality.calibration_error(score, last[1]) < quality.calibration_error(
        model.score(last[0]), last[1]
    )
    better.save(tmp_path)
    again = quality.Classifier.load(tmp_path)
    assert again.score(last[0]) == pytest.approx(score, abs=1e-5)
    one = text(GOOD)
    short = replace(again, chars=len(one))
    assert short.judge([one + text(RAW)]) == short.judge([one]) != again.judge([one + text(RAW)])
    (tmp_path / "classifier.json").write_text("{}")
    with pytest.raises(UserError, match="another format"):
        quality.Classifier.load(tmp_path)
    with pytest.raises(UserError, match="no classifier"):
        quality.Classifier.load(tmp_path / "nothing")


def test_area_under_the_curve_by_counting_pairs() -> None:
    score = np.array([0.1, 0.4, 0.4, 0.8, 0.9, 0.2])
    label = np.array([0, 0, 1, 1, 0, 1])
    pairs = [(p > n) + 0.5 * (p == n) for p in score[label == 1] for n in score[label == 0]]
    assert quality.auc(score, label) == pytest.approx(np.mean(pairs))


def test_calibration_error_of_a_coin() -> None:
    """Everything scored 0.7 where half are positive: the gap is 0.2."""
    assert quality.calibration_error(np.full(10, 0.7), np.arange(10) % 2) == pytest.approx(0.2)


def test_offensive_posts_can_be_told(kit: Path) -> None:
    """The same classifier on COLD's Chinese posts: offensive or not, a third held out."""
    import csv

    with open(kit / "safety" / "cold_dev.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))[:3000]
    view = View([r["TEXT"] for r in rows])
    label = np.array([int(r["label"]) for r in rows])
    x = quality.counts(view)
    held = np.arange(len(rows)) % 3 == 0
    model = quality.train(quality.chosen(x, np.flatnonzero(~held)), label[~held], l2=1e-3, steps=60)
    assert quality.auc(model.score(quality.chosen(x, np.flatnonzero(held))), label[held]) > 0.75
