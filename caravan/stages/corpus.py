"""Clean and deduplicate raw text: files of any known format become documents with a held-out part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from caravan.data import clean, dedup, extract, formats, records, steps
from caravan.data.clean import Rejection
from caravan.data.columns import Column, Names
from caravan.data.steps import Item
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.types import Document, UserError

INPUTS = {"raw": "raw"}
OUTPUT = "corpus"
USES: dict[str, str] = {}
VERSION = 5
_NAMED = 1 << 14
"""Texts of which the names of those that stay are held at a time."""


@dataclass(frozen=True, kw_only=True)
class Config:
    min_chars: int = 20
    """Shorter documents are removed (characters after cleaning)."""
    max_chars: int = 5_000_000
    """Longer documents are removed (characters)."""
    repetition: bool = True
    """Remove documents that repeat lines or word n-grams too much (Gopher's limits; not for source code)."""
    near_duplicates: float = 0.75
    """Remove a document whose 5-grams agree with a longer one's to at least this share; 0 keeps near
    duplicates."""
    languages: tuple[str, ...] = ()
    """Keep these languages only (zh, en, latin, code, ...; by script); empty keeps all."""
    heldout_share: float = 0.02
    """Share of documents kept out of training, by a hash of their text."""
    document_chars: int = 100_000
    """Longer text files become several documents, cut at an empty line (characters)."""
    record_bytes: int = 16 << 20
    """Longer lines are not read but put into quarantine (bytes)."""
    html: str = "fast"
    """How web pages become text: fast, accurate or plain (docs/data/extraction.md)."""
    memory_mb: int = 256
    """About what sorting may hold in memory (megabytes); the rest lies on disk. Changes no result."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    root = inputs["raw"].path
    quarantine = records.Quarantine(out / "quarantine.jsonl", root, rt.strict)
    extract.usable(cfg.html)
    limits = formats.Limits(
        record_bytes=cfg.record_bytes, document_chars=cfg.document_chars, html=cfg.html,
        workers=steps.workers(rt.threads),
    )  # fmt: skip
    chosen: dict[str, str] = {}
    tally = _Tally()
    copies = _Copies(rt.work, cfg.near_duplicates, cfg.memory_mb << 20)
    read = _read(root, quarantine, limits, chosen, tally)
    with records.packed_writer(out / "removed.jsonl.zst") as removed:
        for batch in steps.mapped(
            judged(cfg), steps.item_batches(read), steps.workers(rt.threads), rt.engine
        ):
            for item, verdict in batch:
                if verdict is not None:
                    tally.note(item.document, verdict)
                    removed.write(records.dump_removed(item.document, verdict))
            copies.add([item for item, verdict in batch if verdict is None])
            tally.judged += len(batch)
            rt.report(tally.judged, 0, "documents")
        kept = _write(cfg, out, copies, tally, removed)
    if not kept["train"]:
        raise UserError(
            "nothing is left of the text: " + _why(tally, quarantine), "look at the rules with --help"
        )
    return {
        "documents_in": tally.seen,
        "documents_out": kept["train"] + kept["heldout"],
        "bytes_in": tally.bytes_in,
        "bytes_out": kept["train_bytes"] + kept["heldout_bytes"],
        **kept,
        "heldout_share": round(kept["heldout"] / (kept["train"] + kept["heldout"]), 4),
        "languages": {k: dict(v) for k, v in sorted(tally.languages.items())},
        "removed": dict(sorted(tally.removed.items())),
        "removed_samples": dict(sorted(tally.samples.items())),
        "files": len(chosen),
        "formats": dict(sorted(Counter(chosen.values()).items())),
        **quarantine.facts(),
    }


def judged(cfg: Config) -> steps.Steps:
    """What is asked of each document alone, in this order."""
    chain: list[steps.Step] = [_Clean(), _Length(cfg.min_chars, cfg.max_chars)]
    if cfg.languages:
        chain.append(_Languages(cfg.languages))
    return steps.Steps((*chain, _Shingles(cfg.repetition, bool(cfg.near_duplicates))))


@dataclass(frozen=True)
class _Clean:
    """A tidy text, its digest, its language and an id. Removes nothing."""

    name = "clean"

    def __call__(self, items: Sequence[Item]) -> list[Rejection | None]:
        for item in items:
            document = item.document
            text = clean.normalise(document.text)
            digest = records.digest_of(text)
            lang = document.lang or clean.language(text)
            item.found["digest"] = digest
            item.document = replace(document, text=text, lang=lang, id=document.id or digest[:16])
        return [None] * len(items)


@dataclass(frozen=True)
class _Length:
    low: int
    high: int
    name = "length"

    def __call__(self, items: Sequence[Item]) -> list[Rejection | None]:
        return [self._judge(len(item.document.text)) for item in items]

    def _judge(self, size: int) -> Rejection | None:
        if size < self.low:
            return Rejection("too_short", f"{size} characters (at least {self.low})")
        if size > self.high:
            return Rejection("too_long", f"{size:,} characters (at most {self.high:,})")
        return None


@dataclass(frozen=True)
class _Languages:
    keep: tuple[str, ...]
    name = "language"

    def __call__(self, items: Sequence[Item]) -> list[Rejection | None]:
        langs = (item.document.lang for item in items)
        allowed = ", ".join(self.keep)
        return [
            None if x in self.keep else Rejection("language", f"{x}, not one of {allowed}") for x in langs
        ]


_HASHES = dedup.WordHashes()


@dataclass(frozen=True)
class _Shingles:
    """Rules of repetition, and the signature by which near duplicates are found afterwards."""

    repetition: bool
    signature: bool
    name = "repetition"

    def __call__(self, items: Sequence[Item]) -> list[Rejection | None]:
        verdicts = [self._judge(item) if self.repetition else None for item in items]
        if self.signature:
            for item, row in zip(items, dedup.signatures([i.document.text for i in items]), strict=True):
                item.found["signature"] = row
        return verdicts

    def _judge(self, item: Item) -> Rejection | None:
        text, lang = item.document.text, item.document.lang
        words = [] if lang in clean.UNSPACED else clean.WORD.findall(text.lower())
        return clean.repetition(text, words, _HASHES(words), lang)


class _Copies:
    """Documents that came through, on disk, and which of them are copies: of the same text the first stays,
    of near duplicates the best ranked (`dedup.keepers`)."""

    def __init__(self, folder: Path, similarity: float, memory_bytes: int) -> None:
        self.spool = records.Spool(folder / "clean.jsonl")
        self._folder = folder
        self._same = dedup.SameKey(folder, memory_bytes)
        self._near: dedup.NearDuplicates | None = None
        if similarity:
            self._near = dedup.NearDuplicates(folder, dedup.Setting(similarity=similarity), memory_bytes)
        self._ranks, self._ids = dedup.Ranks(folder), Names(folder)

    def add(self, items: Sequence[Item]) -> None:
        if not items:
            return
        digests = [item.found["digest"] for item in items]
        for item, digest in zip(items, digests, strict=True):
            self.spool.add(records.dump(item.document), digest, item.split)
        hashes = [int(digest[:16], 16) for digest in digests]
        self._same.add_digests([(h, int(digest[16:], 16)) for h, digest in zip(hashes, digests, strict=True)])
        self._ids.add(item.document.id for item in items)
        if self._near:
            self._near.add(np.stack([item.found["signature"] for item in items]))
            heldout = [item.split == "heldout" for item in items]
            self._ranks.add(hashes, [len(item.document.text) for item in items], heldout)

    def judged(self, heldout_share: float) -> Iterator[tuple[str, bytes, Rejection | None]]:
        """(split, line, why it goes or None) of every document, in the order of arrival."""
        repeated, first = self._equal()
        stays = self._resembling(repeated)
        lines = self.spool.split(heldout_share, repeated)
        for at, chunk in repeated.chunks(_NAMED):
            places = np.arange(at, at + len(chunk))
            equal = first.take(places)
            last = stays.take(equal)  # what equals a near duplicate goes for the one that stays
            names = iter(self._ids.take(last[last != places]))
            for place, one, end, (split, line) in zip(places, equal, last, lines, strict=False):
                yield split, line, _copied(one != place, one != end, next(names)) if end != place else None
        for _ in lines:  # none is left; this removes the file
            raise AssertionError("more lines than keys")
        for column in (repeated, first, stays, self._ids):
            column.close()

    def _equal(self) -> tuple[Column, Column]:
        """uint8 [D], 1 for every text that came before; int64 [D], where the first of its kind is."""
        repeated = Column.filled(self._folder, np.uint8, len(self._ids))
        first = Column.numbered(self._folder, len(self._ids))
        for place, same in self._same.runs():
            if not len(place):
                continue
            begins = np.concatenate([[True], ~same])
            head = place[np.maximum.accumulate(np.where(begins, np.arange(len(place)), 0))]
            repeated.put(place[~begins], 1)
            first.put(place[~begins], head[~begins])
        self._same.close()
        return repeated, first

    def _resembling(self, repeated: Column) -> Column:
        """int64 [D]: for a near duplicate where the one is that stays, else its own place."""
        stays = Column.numbered(self._folder, len(self._ids))
        if self._near is None:
            return stays
        links = dedup.Links(len(self._ranks), self._folder)
        self._near.link(self._ranks, links, repeated)
        self._near.close()
        for places, kept in links.pairs(self._ranks):
            stays.put(places, kept)
        for column in (links, self._ranks):
            column.close()
        return stays


def _copied(equal: bool, near: bool, kept: str) -> Rejection:
    """Equal to the text that stays, near it, or equal to one that is near it."""
    if not equal:
        return Rejection("near_duplicate", f"resembles {kept}, which stays", kept)
    like = f"one that resembles {kept}" if near else kept
    return Rejection("exact_duplicate", f"the same text as {like}, which stays", kept)


class _Tally:
    """What was read, what was removed and by which rule, with a few examples."""

    def __init__(self) -> None:
        self.seen = self.judged = self.bytes_in = 0
        self.removed: Counter[str] = Counter()
        self.samples: dict[str, list[str]] = {}
        self.languages: dict[str, Counter[str]] = {}

    def note(self, document: Document, rejection: Rejection) -> None:
        self.removed[rejection.rule] += 1
        samples = self.samples.setdefault(rejection.rule, [])
        if len(samples) < 3:
            samples.append(f"{rejection.reason}: {document.text[:120]}")


def _read(
    root: Path, quarantine: records.Quarantine, limits: formats.Limits, chosen: dict[str, str], tally: _Tally
) -> Iterator[Item]:
    for found in formats.read_all(root, "corpus", quarantine, limits, chosen):
        assert isinstance(found.value, Document)
        tally.seen += 1
        tally.bytes_in += _size(found.value.text)
        yield Item(found.value, found.split)


def _write(cfg: Config, out: Path, copies: _Copies, tally: _Tally, removed: Any) -> dict[str, int]:
    """Everything that stays, to its split; what an earlier document equals or resembles, to the removed
    ones."""
    kept = {"train": 0, "heldout": 0, "train_bytes": 0, "heldout_bytes": 0}
    with (
        records.packed_writer(out / "train.jsonl.zst") as train,
        records.packed_writer(out / "heldout.jsonl.zst") as heldout,
    ):
        for split, line, verdict in copies.judged(cfg.heldout_share):
            document = Document(**orjson.loads(line))
            if verdict is not None:
                tally.note(document, verdict)
                removed.write(records.dump_removed(document, verdict))
                continue
            size = _size(document.text)
            (train if split == "train" else heldout).write(line)
            kept[split] += 1
            kept[f"{split}_bytes"] += size
            tally.languages.setdefault(document.lang, Counter()).update(documents=1, bytes=size)
    return kept


def _size(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _why(tally: _Tally, quarantine: records.Quarantine) -> str:
    reasons = [f"{n} {rule.replace('_', ' ')}" for rule, n in sorted(tally.removed.items())]
    return ", ".join([f"{tally.seen} documents read", *reasons, f"{quarantine.count} quarantined"])
