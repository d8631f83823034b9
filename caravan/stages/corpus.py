"""Clean and deduplicate raw text: files of any known format become documents with a held-out part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from caravan.data import clean, dedup, formats, records
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.types import Document, UserError

INPUTS = {"raw": "raw"}
OUTPUT = "corpus"
USES: dict[str, str] = {}
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    min_chars: int = 20
    """Shorter documents are removed (characters after cleaning)."""
    max_chars: int = 5_000_000
    """Longer documents are removed (characters)."""
    repetition: bool = True
    """Remove documents that repeat lines or word n-grams too much (Gopher's limits; not for source code)."""
    near_duplicates: float = 0.75
    """Remove a document whose 5-grams agree with an earlier one's to at least this share; 0 keeps near
    duplicates."""
    languages: tuple[str, ...] = ()
    """Keep these languages only (zh, en, latin, code, ...; by script); empty keeps all."""
    heldout_share: float = 0.02
    """Share of documents kept out of training, by a hash of their text."""
    document_chars: int = 100_000
    """Longer text files become several documents, cut at an empty line (characters)."""
    record_bytes: int = 16 << 20
    """Longer lines are not read but put into quarantine (bytes)."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    root = inputs["raw"].path
    quarantine = records.Quarantine(out / "quarantine.jsonl", root, rt.strict)
    limits = formats.Limits(record_bytes=cfg.record_bytes, document_chars=cfg.document_chars)
    chosen: dict[str, str] = {}
    sieve = _Sieve(cfg)
    spool = records.Spool(rt.work / "clean.jsonl")
    bytes_in = 0
    with records.packed_writer(out / "removed.jsonl.zst") as removed:
        for found in formats.read_all(root, "corpus", quarantine, limits, chosen):
            assert isinstance(found.value, Document)
            bytes_in += _size(found.value.text)
            document, rejection = sieve(found.value)
            if rejection is None:
                spool.add(records.dump(document), records.digest_of(document.text), found.split)
            else:
                sieve.note(document, rejection)
                removed.write(_removed(document, rejection))
            rt.report(sieve.seen, 0, "documents")
        drop = dedup.near_duplicates(sieve.signatures, cfg.near_duplicates) if cfg.near_duplicates else {}
        kept = _write(cfg, out, spool, drop, sieve, removed)
    if not kept["train"]:
        raise UserError(
            "nothing is left of the text: " + _why(sieve, quarantine), "look at the rules with --help"
        )
    return {
        "documents_in": sieve.seen,
        "documents_out": kept["train"] + kept["heldout"],
        "bytes_in": bytes_in,
        "bytes_out": kept["train_bytes"] + kept["heldout_bytes"],
        **kept,
        "heldout_share": round(kept["heldout"] / (kept["train"] + kept["heldout"]), 4),
        "languages": {k: dict(v) for k, v in sorted(sieve.languages.items())},
        "removed": dict(sorted(sieve.removed.items())),
        "removed_samples": dict(sorted(sieve.samples.items())),
        "files": len(chosen),
        "formats": dict(sorted(Counter(chosen.values()).items())),
        **quarantine.facts(),
    }


class _Sieve:
    """The rules in their order, and what they did."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.seen = 0
        self.signatures: list[np.ndarray] = []
        self.removed: Counter[str] = Counter()
        self.samples: dict[str, list[str]] = {}
        self.languages: dict[str, Counter[str]] = {}
        self._texts: set[bytes] = set()
        self._hash = dedup.WordHashes()

    def __call__(self, document: Document) -> tuple[Document, clean.Rejection | None]:
        self.seen += 1
        text = clean.normalise(document.text)
        lang = document.lang or clean.language(text)
        digest = records.digest_of(text)
        document = replace(document, text=text, lang=lang, id=document.id or digest[:16])
        cfg = self.cfg
        if len(text) < cfg.min_chars:
            return document, clean.Rejection(
                "too_short", f"{len(text)} characters (at least {cfg.min_chars})"
            )
        if len(text) > cfg.max_chars:
            return document, clean.Rejection(
                "too_long", f"{len(text):,} characters (at most {cfg.max_chars:,})"
            )
        if cfg.languages and lang not in cfg.languages:
            return document, clean.Rejection("language", f"{lang}, not one of {', '.join(cfg.languages)}")
        if bytes.fromhex(digest) in self._texts:
            return document, clean.Rejection("exact_duplicate", "the same text came before")
        unspaced = lang in clean.UNSPACED
        words = [] if unspaced else clean.WORD.findall(text.lower())
        units = dedup.char_hashes(text) if unspaced else self._hash(words)
        if cfg.repetition and (rejection := clean.repetition(text, words, units, lang)):
            return document, rejection
        self._texts.add(bytes.fromhex(digest))
        if cfg.near_duplicates:
            self.signatures.append(dedup.signature(units))
        return document, None

    def note(self, document: Document, rejection: clean.Rejection) -> None:
        self.removed[rejection.rule] += 1
        samples = self.samples.setdefault(rejection.rule, [])
        if len(samples) < 3:
            samples.append(f"{rejection.reason}: {document.text[:120]}")


def _write(
    cfg: Config, out: Path, spool: records.Spool, drop: Mapping[int, int], sieve: _Sieve, removed: Any
) -> dict[str, int]:
    """Everything that stays, to its split; what an earlier document resembles, to the removed ones."""
    kept = {"train": 0, "heldout": 0, "train_bytes": 0, "heldout_bytes": 0}
    with (
        records.packed_writer(out / "train.jsonl.zst") as train,
        records.packed_writer(out / "heldout.jsonl.zst") as heldout,
    ):
        for index, (split, line) in enumerate(spool.split(cfg.heldout_share)):
            document = Document(**orjson.loads(line))
            if index in drop:
                rejection = clean.Rejection(
                    "near_duplicate", f"resembles document {drop[index]} of those kept before"
                )
                sieve.note(document, rejection)
                removed.write(_removed(document, rejection))
                continue
            size = _size(document.text)
            (train if split == "train" else heldout).write(line)
            kept[split] += 1
            kept[f"{split}_bytes"] += size
            sieve.languages.setdefault(document.lang, Counter()).update(documents=1, bytes=size)
    return kept


def _removed(document: Document, rejection: clean.Rejection) -> bytes:
    row = {
        "id": document.id,
        "source": document.source,
        "rule": rejection.rule,
        "reason": rejection.reason,
        "text": document.text[:500],
    }
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def _size(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _why(sieve: _Sieve, quarantine: records.Quarantine) -> str:
    reasons = [f"{n} {rule.replace('_', ' ')}" for rule, n in sorted(sieve.removed.items())]
    return ", ".join([f"{sieve.seen} documents read", *reasons, f"{quarantine.count} quarantined"])
