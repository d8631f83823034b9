"""Remove copies from a corpus: exact, by address, near (MinHash), by meaning, and copied spans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from caravan.data import dedup, measure, records, rewrite, steps
from caravan.data.clean import Rejection
from caravan.data.dedup import semantic, substring, units, url
from caravan.data.dedup.substring import Span
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.types import Document, UserError

INPUTS = {"corpus": "corpus", "embeddings": "raw?", "model": "model?"}
OUTPUT = "corpus"
USES: dict[str, str] = {}
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    exact: bool = True
    """Remove texts that another one equals, white space aside."""
    url: bool = False
    """Remove texts whose source is an address that another one has, however spelt."""
    near: float = 0.75
    """Remove texts whose 5-grams agree with another's to about this share (Jaccard similarity by MinHash);
    0 keeps near duplicates."""
    bands: int = 14
    """Bands of a MinHash signature: texts are compared if one agrees in full."""
    rows: int = 8
    """Numbers per band."""
    substring: int = 0
    """Cut out spans of at least this many tokens that another text has (50 is usual); 0 leaves them."""
    min_chars: int = 20
    """A text of which cut spans leave less is removed (characters)."""
    semantic: float = 0.0
    """Remove texts whose embedding has at least this cosine with another's (0.95, say); 0 is off. Needs
    --embeddings or --model."""
    groups: int = 0
    """Groups within which embeddings are compared; 0 chooses by the number of texts."""
    embed_tokens: int = 512
    """How much of a text --model reads to embed it (tokens)."""
    memory_mb: int = 1024
    """About what sorting may hold in memory (megabytes); the rest lies on disk. Changes no result."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    if cfg.semantic and not inputs.keys() & {"embeddings", "model"}:
        raise UserError(
            "comparing meanings needs embeddings", "give --embeddings FILE, or a --model to make them"
        )
    setting = dedup.Setting(cfg.bands, cfg.rows, cfg.near)
    folder = rt.work / "dedup"
    folder.mkdir(parents=True, exist_ok=True)
    corpus = inputs["corpus"]
    found = _Copies(dedup.Ranks())
    facts = _documents(cfg, setting, corpus, folder, found, rt)
    if cfg.semantic:
        facts["semantic"] = _semantic(cfg, inputs, found, rt)
    spans = _spans(cfg, corpus, folder, found, rt) if cfg.substring else {}
    ids = _ids(corpus.path, found.origins | {s.origin for many in spans.values() for s in many})
    with rewrite.Rewrite(out) as files, records.packed_writer(out / "spans.jsonl.zst") as cuts:
        tally: Counter[str] = Counter()
        for place, (split, document) in enumerate(rewrite.read(corpus.path)):
            if place in found.why:
                origin = ids[found.survivor(place)]
                rule, reason = found.why[place]
                files.remove(document, Rejection(rule, f"{reason} {origin}, which stays"), kept=origin)
            elif place in spans:
                _cut(cfg, split, document, spans[place], ids, files, cuts, tally)
            else:
                files.keep(split, document)
    sizes = Counter(Counter(found.survivor(p) for p in found.why).values())
    return {
        **files.facts(),
        "duplicates": facts,
        "clusters": {str(n + 1): count for n, count in sorted(sizes.items())},
        "spans": dict(tally),
        "curve": setting.curve() if cfg.near else [],
    }


class _Copies:
    """Which texts go, by the first method that finds them, and in whose place another stays."""

    def __init__(self, ranks: dedup.Ranks) -> None:
        self.ranks = ranks
        self.why: dict[int, tuple[str, str]] = {}
        self._stays: dict[int, int] = {}

    def add(self, rule: str, copies: np.ndarray, stays: np.ndarray, reasons: Sequence[str]) -> int:
        """How many are new."""
        before = len(self.why)
        for copy, stay, reason in zip(copies.tolist(), stays.tolist(), reasons, strict=True):
            if copy not in self.why:
                self.why[copy], self._stays[copy] = (rule, reason), stay
        return len(self.why) - before

    def survivor(self, place: int) -> int:
        """Who stays in the end: each text gives way to a better ranked one, so this ends."""
        while place in self._stays:
            place = self._stays[place]
        return place

    @property
    def origins(self) -> set[int]:
        return {self.survivor(place) for place in self.why}


@dataclass(frozen=True)
class _Look:
    """What is needed to know of each text alone: batch -> columns. Cheap to send to another process."""

    exact: bool
    url: bool
    places: int

    def __call__(self, batch: Sequence[tuple[str, Document]]) -> dict[str, Any]:
        documents = [d for _, d in batch]
        texts = [d.text for d in documents]
        return {
            "hash": [units.digest(d.text, d.id, d.source)[0] for d in documents],
            "chars": [len(t) for t in texts],
            "heldout": [split == "heldout" for split, _ in batch],
            "exact": [dedup.text_key(t) for t in texts] if self.exact else [],
            "url": [url.normalise(d.source) for d in documents] if self.url else [],
            "near": dedup.signatures(texts, self.places) if self.places else None,
        }


def _documents(
    cfg: Config, setting: dedup.Setting, corpus: Artefact, folder: Path, found: _Copies, rt: Runtime
) -> dict[str, int]:
    memory = cfg.memory_mb << 20
    keyed = {n: dedup.SameKey(folder, memory) for n in ("exact", "url") if getattr(cfg, n)}
    near = dedup.NearDuplicates(folder, setting, memory) if cfg.near else None
    look = _Look(cfg.exact, cfg.url, setting.places if near else 0)
    done, total = 0, int(corpus.facts.get("documents_out", 0))
    batches = steps.batches(rewrite.read(corpus.path), lambda row: len(row[1].text))
    for columns in steps.mapped(look, batches, steps.workers(rt.threads), rt.engine):
        found.ranks.add(columns["hash"], columns["chars"], columns["heldout"])
        for name, one in keyed.items():
            one.add(columns[name])
        if near:
            near.add(columns["near"])
        done += len(columns["hash"])
        rt.report(done, total, "documents")
    facts = {}
    for name, one in keyed.items():
        links = dedup.Links(done)
        one.link(found.ranks, links)
        copies, stays = links.clusters(found.ranks)
        reason = "the same text as" if name == "exact" else "from the same address as"
        facts[name] = found.add(f"{name}_duplicate", copies, stays, [reason] * len(copies))
    if near:
        links = dedup.Links(done)
        near.link(found.ranks, links)
        copies, stays = links.clusters(found.ranks)
        agree = near.estimate(copies, stays)
        facts["near"] = found.add(
            "near_duplicate", copies, stays, [f"{a:.0%} of its 5-grams agree with those of" for a in agree]
        )
        facts |= {"pairs_met": near.met, "pairs_alike": near.agreed}
        near.close()
    return facts


def _semantic(cfg: Config, inputs: Mapping[str, Artefact], found: _Copies, rt: Runtime) -> int:
    corpus = inputs["corpus"]
    if "embeddings" in inputs:
        rows = semantic.read(inputs["embeddings"].path, [d.id for _, d in rewrite.read(corpus.path)])
    else:
        from caravan.stages._embed import Embedder

        embed = Embedder(inputs["model"], cfg.embed_tokens, rt)
        path, width, done = rt.work / "embeddings.f32", 0, 0
        with open(path, "wb") as file:
            for batch in measure.document_batches(d for _, d in rewrite.read(corpus.path)):
                made = embed([d.text for d in batch])
                file.write(made.tobytes())
                width, done = made.shape[1], done + len(batch)
                rt.report(done, len(found.ranks), "embeddings")
        rows = np.memmap(path, np.float32, "r").reshape(-1, width)
    copies, stays, cosine = semantic.similar(rows, found.ranks, cfg.semantic, cfg.groups)
    reasons = [f"a cosine of {c:.3f} with" for c in cosine]
    return found.add("semantic_duplicate", copies, stays, reasons)


@dataclass(frozen=True)
class _Units:
    def __call__(self, texts: Sequence[str]) -> list[units.Units]:
        return [units.units(part, units.EVERYTHING) for part in units.portions(texts)]


def _spans(cfg: Config, corpus: Artefact, folder: Path, found: _Copies, rt: Runtime) -> dict[int, list[Span]]:
    """Place in the corpus -> its spans that are copies, among the texts that stay."""
    hashes, chars, heldout = found.ranks.columns()
    places = np.delete(np.arange(len(hashes)), np.fromiter(found.why, np.int64, len(found.why)))
    ranks = dedup.Ranks()
    ranks.add(hashes[places], chars[places], heldout[places])
    search = substring.Spans(folder, cfg.substring, cfg.memory_mb << 20)

    def texts() -> Iterator[str]:
        rows = enumerate(rewrite.read(corpus.path))
        return (document.text for place, (_, document) in rows if place not in found.why)

    for cuts in steps.mapped(_Units(), steps.batches(texts(), len), steps.workers(rt.threads), rt.engine):
        for cut in cuts:
            search.add(cut)
        rt.report(search.tokens, 0, "tokens")
    out: dict[int, list[Span]] = {}
    for span in search.found(ranks):
        origin = int(places[span.origin])
        out.setdefault(int(places[span.place]), []).append(replace(span, origin=origin))
    search.close()
    return out


def _cut(
    cfg: Config, split: str, document: Document, spans: list[Span], ids: Mapping[int, str],
    files: rewrite.Rewrite, cuts: Any, tally: Counter[str],
) -> None:  # fmt: skip
    starts, ends = units.units([document.text], units.EVERYTHING).spans(0)
    text = substring.without(document.text, starts, spans)
    tally.update(documents=1, spans=len(spans), tokens=sum(s.stop - s.start for s in spans))
    tally.update(chars=len(document.text) - len(text))
    for span in spans:
        first, last = int(starts[span.start]), int(ends[span.stop - 1])
        row = {
            "id": document.id, "start": first, "stop": last, "tokens": span.stop - span.start,
            "kept": ids[span.origin], "text": document.text[first : min(last, first + 200)],
        }  # fmt: skip
        cuts.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    if len(text) < cfg.min_chars:
        origins = sorted({ids[s.origin] for s in spans})
        reason = f"{len(text)} characters are left without spans of {', '.join(origins[:3])}, which stays"
        files.remove(document, Rejection("copied_spans", reason), kept=origins[0])
    else:
        files.keep(split, replace(document, text=text), document)


def _ids(corpus: Path, places: set[int]) -> dict[int, str]:
    """Ids of the texts at these places."""
    if not places:
        return {}
    return {p: document.id for p, (_, document) in enumerate(rewrite.read(corpus)) if p in places}
