"""Train a classifier of texts, good from raw (GPT-3's quality filter) or toxic from harmless."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from caravan.data import measure, quality, records, steps
from caravan.data.signals import View
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.types import Document, UserError

INPUTS = {"positive": "corpus", "negative": "corpus"}
OUTPUT = "classifier"
USES: dict[str, str] = {}
VERSION = 1
_MEASURED, _CALIBRATED = 0.1, 0.2


@dataclass(frozen=True, kw_only=True)
class Config:
    documents: int = 50_000
    """Documents of each kind, about; of more, a sample by a hash of their ids. Memory grows with it: about
    0.6 GB for twice 50,000."""
    chars: int = 5_000
    """Characters read of each document, from its beginning, in training and ever after."""
    l2: float = 1e-4
    """Weight of the squared weights in the loss."""
    steps: int = 100
    """L-BFGS steps at most; it stops earlier when the loss stands still."""
    alpha: float = 9.0
    """Shape of the Pareto draw for which the facts state keep rates; the rule itself has its own."""


@dataclass(frozen=True)
class _Features:
    chars: int

    def __call__(self, documents: list[Document]) -> quality.Counts:
        return quality.counts(View([d.text[: self.chars] for d in documents]))


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    parts, labels, ids = [], [], []
    for kind, role in ((1, "positive"), (0, "negative")):
        limit = _limit(inputs[role], cfg.documents)
        found = list(
            steps.mapped(
                _Features(cfg.chars), _batches(inputs[role], limit), steps.workers(rt.threads), rt.engine
            )
        )
        names = [d.id for batch in _batches(inputs[role], limit) for d in batch]
        parts += found
        ids += names
        labels += [kind] * len(names)
        rt.report(len(ids), 2 * cfg.documents, "documents")
    x, label = quality.stacked(parts), np.array(labels)
    draw = quality.uniform(ids, 2)
    for name, low, high in (("train on", _CALIBRATED, 1.0), ("calibrate on", _MEASURED, _CALIBRATED),
                            ("measure on", 0.0, _MEASURED)):  # fmt: skip
        seen = label[(draw >= low) & (draw < high)]
        if len(np.unique(seen)) < 2:
            raise UserError(f"too few documents of one kind to {name} ({len(ids)} in all)", "give more text")
    train = np.flatnonzero(draw >= _CALIBRATED)
    between = np.flatnonzero((draw >= _MEASURED) & (draw < _CALIBRATED))
    last = np.flatnonzero(draw < _MEASURED)
    raw = quality.train(
        quality.chosen(x, train), label[train], cfg.l2, cfg.steps,
        lambda step, loss: rt.report(step, cfg.steps, "steps", loss=loss),
    )  # fmt: skip
    model = quality.calibrated(replace(raw, chars=cfg.chars), quality.chosen(x, between), label[between])
    model.save(out)
    return {
        "documents": {"positive": int(label.sum()), "negative": int(len(label) - label.sum())},
        "trained_on": len(train),
        "calibrated_on": len(between),
        **_measured(model, quality.chosen(x, last), label[last], cfg.alpha),
    }


def _measured(
    model: quality.Classifier, x: quality.Counts, label: np.ndarray, alpha: float
) -> dict[str, Any]:
    score = model.score(x)
    rate = quality.keep_rate(score, alpha)
    found = score >= 0.5
    return {
        "measured_on": len(label),
        "auc": round(quality.auc(score, label), 5),
        "calibration_error": round(quality.calibration_error(score, label), 5),
        "recall": round(float(found[label == 1].mean()), 4),
        "false_positives": round(float(found[label == 0].mean()), 4),
        "kept_of_positive": round(float(rate[label == 1].mean()), 4),
        "kept_of_negative": round(float(rate[label == 0].mean()), 4),
    }


def _documents(corpus: Artefact) -> Iterator[Document]:
    for split in records.SPLITS:
        yield from records.read_documents(corpus / f"{split}.jsonl.zst")


def _limit(corpus: Artefact, most: int) -> float:
    """Documents whose draw is below this are about `most`."""
    return min(1.0, most / max(1, int(corpus.facts.get("documents_out", most))))


def _batches(corpus: Artefact, limit: float) -> Iterator[list[Document]]:
    chosen = (d for d in _documents(corpus) if limit >= 1 or quality.uniform([d.id], 3)[0] < limit)
    return measure.document_batches(chosen)
