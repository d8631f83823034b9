"""Measure every document of a corpus: numbers by which rules decide afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caravan.data import measure, records, signals, steps
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.types import Document

INPUTS = {"corpus": "corpus", "model": "model?", "quality": "classifier?", "toxicity": "classifier?"}
OUTPUT = "signals"
USES = {"families": "data/signals"}
VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Config:
    families: tuple[str, ...] = ("auto",)
    """Which signals to compute; auto computes them all."""
    perplexity_tokens: int = 1024
    """With a model: how much of each document it reads (tokens from the beginning)."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    corpus = inputs["corpus"]
    families = signals.names() if cfg.families == ("auto",) else cfg.families
    classifiers = tuple((n, str(inputs[n].path)) for n in measure.CLASSIFIED if n in inputs)
    work = measure.Measure(families, classifiers)
    perplexity = _Perplexity(inputs["model"], cfg.perplexity_tokens, rt) if "model" in inputs else None
    workers = steps.workers(rt.threads)
    total = int(corpus.facts.get("documents_out", 0))
    sample, languages, done = measure.Sample(), Counter[str](), 0
    for split in records.SPLITS:
        texts = _batches(corpus, split)
        with measure.Writer(out / f"{split}.parquet") as writer:
            for table in steps.mapped(work, _batches(corpus, split), workers, rt.engine):
                if perplexity:
                    table[measure.PERPLEXITY] = perplexity(next(texts))
                writer.write(table)
                sample.add(table)
                languages.update(table.get("lang", np.zeros(0, object)).tolist())
                done += len(table["id"])
                rt.report(done, total, "documents")
    return {
        "documents": done,
        "columns": list(signals.columns(families)) + [n for n, _ in classifiers]
        + ([measure.PERPLEXITY] if perplexity else []),
        "languages": dict(sorted(languages.items())),
        "quantiles": sample.quantiles(),
    }  # fmt: skip


def _batches(corpus: Artefact, split: str) -> Iterator[list[Document]]:
    return measure.document_batches(records.read_documents(corpus / f"{split}.jsonl.zst"))


class _Perplexity:
    """Bits per byte of the beginning of each document under a model: comparable across tokenizers."""

    def __init__(self, model: Artefact, tokens: int, rt: Runtime) -> None:
        from caravan.data.tokenizer import Tokenizer
        from caravan.model.checkpoint import load_model
        from caravan.systems.runtime import setup

        self._machine = setup(rt)
        self._tokenizer = Tokenizer.load(model.path)
        self._model = load_model(model.path, device=self._machine.device).eval()
        self._tokens = min(tokens, self._model.spec.max_pos)

    def __call__(self, documents: list[Document]) -> np.ndarray:
        """float32 [D]; not a number for a text of no tokens."""
        from caravan.evals.likelihood import Scored, logprobs

        tok = self._tokenizer
        start = tok.eos if tok.bos is None else tok.bos
        rows = []
        for d in documents:
            # A token is at most a few dozen characters; the rest need not be encoded.
            ids = tok.encode(d.text[: 32 * self._tokens])
            rows.append(([] if start is None else [start]) + ids[: self._tokens - 1])
        out = np.full(len(documents), np.nan, np.float32)
        chosen = [k for k, ids in enumerate(rows) if len(ids) > 1]
        found = logprobs(self._model, [Scored(rows[k], 1) for k in chosen])
        for k, logp in zip(chosen, found, strict=True):
            size = sum(len(tok.bytes_of(i)) for i in rows[k][1:])
            out[k] = -float(logp.double().sum()) / np.log(2) / max(1, size)
        return out
