"""A quality classifier as GPT-3 made one: hashed word counts, logistic regression, and a draw by its score.

Brown et al. 2020, appendix A: a logistic regression on hashed term frequencies tells good text (positive)
from raw text (negative), and a document is kept if numpy.random.pareto(9) > 1 - score, so that some of what
scores low stays. numpy's Pareto is Lomax, P(X > x) = (1 + x)^-9, hence

    P(kept | s) = (2 - s)^-9        s = 0: 0.002   0.5: 0.026   0.75: 0.134   0.9: 0.424   1: 1

We draw by a hash of the document's id: the same document is kept whatever stands beside it. Words are runs
of letters, lower-cased; in Han text every character and every pair of neighbours is one. A text's counts
are taken as 1 + ln(count) and divided by their length, so that long documents do not shout.

Legend: D documents, F features (2^18), Z counts that are not zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import orjson

from caravan.data.signals._view import HAN, View
from caravan.types import UserError

BITS = 18
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Counts:
    """Sparse rows: document `row_Z` has `value_Z` of feature `column_Z`; rows ascend."""

    row_Z: np.ndarray
    column_Z: np.ndarray
    value_Z: np.ndarray
    rows: int

    def times(self, weight_F: np.ndarray) -> np.ndarray:
        """float64 [D]: each row's inner product, added up in the order of its columns."""
        return np.bincount(self.row_Z, self.value_Z * weight_F[self.column_Z], self.rows)

    def transposed_times(self, value_D: np.ndarray) -> np.ndarray:
        """float64 [F]."""
        return np.bincount(self.column_Z, self.value_Z * value_D[self.row_Z], 1 << BITS)


def counts(view: View) -> Counts:
    """Hashed, damped and normalised counts of a batch."""
    document, unit = _units(view)
    key = (document.astype(np.uint64) << np.uint64(BITS)) | (unit >> np.uint64(64 - BITS))
    found, times = np.unique(key, return_counts=True)
    row = (found >> np.uint64(BITS)).astype(np.int64)
    value = 1.0 + np.log(times)
    norm = np.sqrt(np.bincount(row, value * value, len(view)))
    return Counts(row, (found & np.uint64((1 << BITS) - 1)).astype(np.int64), value / norm[row], len(view))


def stacked(parts: Iterable[Counts]) -> Counts:
    """Rows of several batches, one below the other."""
    rows, columns, values, done = [], [], [], 0
    for part in parts:
        rows.append(part.row_Z + done)
        columns.append(part.column_Z.astype(np.int32))
        values.append(part.value_Z.astype(np.float32))
        done += part.rows
    if not rows:
        return Counts(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32), 0)
    return Counts(np.concatenate(rows), np.concatenate(columns), np.concatenate(values), done)


def chosen(x: Counts, rows: np.ndarray) -> Counts:
    """Some of the rows, given in ascending order."""
    place = np.full(x.rows, -1)
    place[rows] = np.arange(len(rows))
    keep = place[x.row_Z] >= 0
    return Counts(place[x.row_Z[keep]], x.column_Z[keep], x.value_Z[keep], len(rows))


def _units(view: View) -> tuple[np.ndarray, np.ndarray]:
    """(document, hash) of every unit: words without Han characters, Han characters and pairs of them."""
    document, word = view.document_V, view.hash_V
    place = view.places(HAN)
    if not len(place):
        return document, word
    start = view.word_start_W[view.has_letters_W]
    with_han = np.zeros(len(word), np.bool_)
    with_han[np.searchsorted(start, place, side="right") - 1] = True
    inside = np.searchsorted(view.end_D, place, side="right")
    with np.errstate(over="ignore"):
        code = view.codes_N[place].astype(np.uint64)
        one = _mix(code)
        near = np.flatnonzero(place[1:] == place[:-1] + 1)
        two = _mix(one[near] ^ (code[near + 1] * np.uint64(0xD1342543DE82EF95)))
    return (
        np.concatenate([document[~with_han], inside, inside[near]]),
        np.concatenate([word[~with_han], one, two]),
    )


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return (x ^ (x >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True, slots=True)
class Classifier:
    """score = sigmoid(slope * (weight . x + bias) + offset); slope and offset calibrate it."""

    weight_F: np.ndarray
    bias: float
    slope: float = 1.0
    offset: float = 0.0
    chars: int = 0
    """Characters it reads of a document, as in training; 0 reads it whole."""

    def margin(self, x: Counts) -> np.ndarray:
        """float64 [D]: what the regression says, before calibration."""
        return x.times(self.weight_F) + self.bias

    def score(self, x: Counts) -> np.ndarray:
        """float32 [D] in [0, 1]: how surely a document is of the positive kind."""
        return sigmoid(self.slope * self.margin(x) + self.offset).astype(np.float32)

    def judge(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [D]: the score of each text, by the part it reads."""
        return self.score(counts(View([t[: self.chars or None] for t in texts])))

    def save(self, folder: Path) -> None:
        """classifier.safetensors and classifier.json."""
        from safetensors.numpy import save_file

        save_file({"weight": self.weight_F.astype(np.float32)}, folder / "classifier.safetensors")
        names = ("bias", "slope", "offset", "chars")
        facts = {"format": _FORMAT, "bits": BITS, **{name: getattr(self, name) for name in names}}
        (folder / "classifier.json").write_bytes(orjson.dumps(facts, option=orjson.OPT_INDENT_2))

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """Raises UserError if the folder holds no classifier of this format."""
        from safetensors.numpy import load_file

        try:
            facts = orjson.loads((folder / "classifier.json").read_bytes())
            weight = load_file(folder / "classifier.safetensors")["weight"]
        except Exception as error:
            raise UserError(f"there is no classifier in {folder}: {error}") from error
        if facts.get("format") != _FORMAT or weight.shape != (1 << BITS,):
            raise UserError(f"the classifier in {folder} has another format", "train it again")
        return cls(weight.astype(np.float64), facts["bias"], facts["slope"], facts["offset"], facts["chars"])


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def train(
    x: Counts, label_D: np.ndarray, l2: float, steps: int, report: Callable[[int, float], None] | None = None
) -> Classifier:
    """Logistic regression by L-BFGS; both kinds weigh the same, however many there are of each.

    Minimises the mean of the two kinds' mean losses + l2/2 |w|^2. `label_D` 0 or 1; both must occur.
    """
    label = label_D.astype(np.float64)
    positive = label.sum()
    assert 0 < positive < len(label), "both kinds must occur"
    share_D = np.where(label > 0, 0.5 / positive, 0.5 / (len(label) - positive))

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = point[:-1], point[-1]
        margin = x.times(weight) + bias
        value = share_D @ (np.logaddexp(0.0, margin) - label * margin) + 0.5 * l2 * (weight @ weight)
        pull = share_D * (sigmoid(margin) - label)
        return float(value), np.append(x.transposed_times(pull) + l2 * weight, pull.sum())

    point = lbfgs(loss, np.zeros((1 << BITS) + 1), steps, report)
    return Classifier(point[:-1], float(point[-1]))


def lbfgs(
    loss: Callable[[np.ndarray], tuple[float, np.ndarray]], point: np.ndarray, steps: int,
    report: Callable[[int, float], None] | None = None, memory: int = 10,
) -> np.ndarray:  # fmt: skip
    """Minimum of a smooth convex function (Nocedal and Wright, algorithm 7.5), halving steps that do not help
    enough."""
    value, slope = loss(point)
    past: list[tuple[np.ndarray, np.ndarray]] = []
    for step in range(steps):
        direction = -slope
        kept = []
        for moved, turned in reversed(past):
            alpha = (moved @ direction) / (turned @ moved)
            kept.append(alpha)
            direction = direction - alpha * turned
        if past:
            moved, turned = past[-1]
            direction *= (moved @ turned) / (turned @ turned)
        for (moved, turned), alpha in zip(past, reversed(kept), strict=True):
            direction += (alpha - (turned @ direction) / (turned @ moved)) * moved
        length = 1.0 if past else 1.0 / max(float(np.linalg.norm(slope)), 1e-12)
        descent = float(direction @ slope)
        for _ in range(30):
            there = point + length * direction
            new_value, new_slope = loss(there)
            if new_value <= value + 1e-4 * length * descent:
                break
            length *= 0.5
        else:
            break  # no smaller value to be had: this is the minimum, as far as float64 can tell
        moved, turned = there - point, new_slope - slope
        if moved @ turned > 1e-14:
            past = [*past[1 - memory :], (moved, turned)]
        gain = value - new_value
        point, value, slope = there, new_value, new_slope
        if report:
            report(step + 1, value)
        if gain <= 1e-9 * max(1.0, abs(value)):
            break
    return point


def calibrated(classifier: Classifier, x: Counts, label_D: np.ndarray) -> Classifier:
    """Platt's sigmoid on documents not trained on (Platt 1999; targets drawn in, both kinds weigh the
    same)."""
    margin = classifier.margin(x)
    positive = label_D.sum()
    negative = len(label_D) - positive
    target = np.where(label_D > 0, (positive + 1) / (positive + 2), 1 / (negative + 2))
    share = np.where(label_D > 0, 0.5 / max(positive, 1), 0.5 / max(negative, 1))

    def loss(p: np.ndarray) -> tuple[float, np.ndarray]:
        z = p[0] * margin + p[1]
        pull = share * (sigmoid(z) - target)
        return float(share @ (np.logaddexp(0.0, z) - target * z)), np.array([pull @ margin, pull.sum()])

    slope, offset = lbfgs(loss, np.array([1.0, 0.0]), 100)
    return replace(classifier, slope=float(slope), offset=float(offset))


def auc(score_D: np.ndarray, label_D: np.ndarray) -> float:
    """Chance that a positive scores above a negative, ties counting half."""
    _, place, times = np.unique(score_D, return_inverse=True, return_counts=True)
    ends = np.cumsum(times)
    rank = (ends - (times - 1) / 2)[place]
    positive = float(label_D.sum())
    negative = len(label_D) - positive
    if not positive or not negative:
        return float("nan")
    return float((rank[label_D > 0].sum() - positive * (positive + 1) / 2) / (positive * negative))


def calibration_error(score_D: np.ndarray, label_D: np.ndarray, bins: int = 10) -> float:
    """Mean gap between score and share of positives over equal bins of the score, both kinds weighing the
    same."""
    positive = max(1.0, float(label_D.sum()))
    weight = np.where(label_D > 0, 0.5 / positive, 0.5 / max(1.0, len(label_D) - positive))
    place = np.minimum((score_D * bins).astype(np.int64), bins - 1)
    gap = np.bincount(place, weight * (score_D - label_D), bins)
    return float(np.abs(gap).sum() / weight.sum())


def uniform(ids: Sequence[str], seed: int) -> np.ndarray:
    """float64 [D] in [0, 1): a hash of each id and the seed."""
    key = seed.to_bytes(8, "little", signed=True)
    digests = (
        hashlib.blake2b(i.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest() for i in ids
    )
    words = np.frombuffer(b"".join(digests), "<u8")
    return (words >> np.uint64(11)) * 2.0**-53


def keep_rate(score: np.ndarray, alpha: float) -> np.ndarray:
    """Chance that a document of this score is kept: (2 - score)^-alpha."""
    return (2.0 - np.asarray(score, np.float64)) ** -alpha


def pareto_keeps(ids: Sequence[str], score_D: np.ndarray, alpha: float, seed: int = 0) -> np.ndarray:
    """bool [D]: pareto(alpha) > 1 - score, drawn by a hash of the id."""
    return uniform(ids, seed) < keep_rate(score_D, alpha)
