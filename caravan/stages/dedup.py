"""Remove copies from a corpus: exact, by address, near (MinHash), by meaning, and copied spans."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson

from caravan.data import dedup, measure, records, rewrite, steps
from caravan.data.clean import Rejection
from caravan.data.columns import Column, Names
from caravan.data.dedup import semantic, sentences, substring, units, url
from caravan.data.dedup.substring import Span
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.types import Document, UserError

T = TypeVar("T")

INPUTS = {"corpus": "corpus", "embeddings": "raw?", "model": "model?"}
OUTPUT = "corpus"
USES: dict[str, str] = {}
VERSION = 2


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
    sentences: int = 0
    """Cut out spans of at least this many sentences that another text has (C4's paper: 3); 0 leaves them."""
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
    found = _Copies(folder)
    facts = _documents(cfg, setting, corpus, folder, found, rt)
    if cfg.semantic:
        facts["semantic"] = _semantic(cfg, inputs, folder, found, rt)
    asked = (("tokens", cfg.substring), ("sentences", cfg.sentences))
    spans = _by_text([_spans(cfg, _Units(u), n, corpus, folder, found, rt) for u, n in asked if n])
    with rewrite.Rewrite(out) as files, records.packed_writer(out / "spans.jsonl.zst") as cuts:
        tally: Counter[str] = Counter()
        copied, own = next(spans, (-1, []))
        rows = enumerate(rewrite.read(corpus.path))
        for (place, (split, document)), gone in zip(rows, found.verdicts(), strict=True):
            if gone:
                files.remove(document, gone[0], kept=gone[1])
            elif place == copied:
                _cut(cfg, split, document, own, found.ids, files, cuts, tally)
                copied, own = next(spans, (-1, []))
            else:
                files.keep(split, document)
    return {
        **files.facts(),
        "duplicates": facts,
        "clusters": found.sizes(),
        "spans": dict(tally),
        "curve": setting.curve() if cfg.near else [],
    }


REASONS = {
    "exact": "the same text as",
    "url": "from the same address as",
    "near": "{:.0%} of its 5-grams agree with those of",
    "semantic": "a cosine of {:.3f} with",
}


class _Copies:
    """Which texts go, by the first method that finds them, and in whose place another stays. On disk, 17
    bytes per text and their ids."""

    def __init__(self, folder: Path) -> None:
        self.ranks, self.ids, self._folder = dedup.Ranks(folder), Names(folder), folder

    def close(self) -> None:
        """All texts are known: nothing goes yet."""
        self.rules = Column.filled(self._folder, np.uint8, len(self.ranks))
        """0, or one more than the place of a rule in REASONS."""
        self._stays = Column.numbered(self._folder, len(self.ranks))
        self._value = Column.filled(self._folder, np.float64, len(self.ranks))

    def add(self, rule: str, found: Iterable[tuple[np.ndarray, ...]]) -> int:
        """(copies, who stays, perhaps how alike) by a rule of REASONS, some at a time; how many are new."""
        total = 0
        for copies, stays, *value in found:
            new = self.rules.take(copies) == 0
            copies, stays = copies[new], stays[new]
            self.rules.put(copies, 1 + list(REASONS).index(rule))
            self._stays.put(copies, stays)
            self._value.put(copies, value[0][new] if value else 0)
            total += len(copies)
        return total

    def survivors(self, places: np.ndarray) -> np.ndarray:
        """Who stays in the end: each text gives way to a better ranked one, so this ends."""
        while ((above := self._stays.take(places)) != places).any():
            places = above
        return places

    def _gone(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(place of a part's first, rules of its texts, those that go counted from there)."""
        for at, rules in self.rules.chunks():
            yield at, rules, np.flatnonzero(rules)

    def verdicts(self) -> Iterator[tuple[Rejection, str] | None]:
        """Of every text: nothing, or why it goes and the id of the one that stays."""
        for at, rules, gone in self._gone():
            out: list[tuple[Rejection, str] | None] = [None] * len(rules)
            values = self._value.take(gone + at).tolist()
            origins = self.ids.take(self.survivors(gone + at))
            for k, value, origin in zip(gone.tolist(), values, origins, strict=True):
                rule, reason = list(REASONS.items())[rules[k] - 1]
                why = f"{reason.format(value)} {origin}, which stays"
                out[k] = Rejection(f"{rule}_duplicate", why), origin
            yield from out

    def sizes(self) -> dict[str, int]:
        """Texts in a cluster -> how many such clusters."""
        copies = Column.filled(self._folder, np.int64, len(self.ranks))
        for at, _, gone in self._gone():
            copies.count(self.survivors(gone + at))
        sizes: Counter[int] = Counter()
        for _, part in copies.chunks():
            sizes.update(part[part > 0].tolist())
        copies.close()
        return {str(n + 1): count for n, count in sorted(sizes.items())}

    def left(self, rows: Iterable[T]) -> Iterator[T]:
        """Those of the corpus's rows whose texts stay."""
        rules = chain.from_iterable(part.tolist() for _, part in self.rules.chunks())
        return (row for row, rule in zip(rows, rules, strict=True) if not rule)


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
            "id": [d.id for d in documents],
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
        found.ids.add(columns["id"])
        for name, one in keyed.items():
            one.add(columns[name])
        if near:
            near.add(columns["near"])
        done += len(columns["hash"])
        rt.report(done, total, "documents")
    found.close()
    facts = {}
    for name, one in keyed.items():
        links = dedup.Links(done, folder)
        one.link(found.ranks, links)
        facts[name] = found.add(name, links.pairs(found.ranks))
        links.close()
    if near:
        links = dedup.Links(done, folder)
        near.link(found.ranks, links)
        alike = ((c, s, near.estimate(c, s)) for c, s in links.pairs(found.ranks))
        facts["near"] = found.add("near", alike)
        facts |= {"pairs_met": near.met, "pairs_alike": near.agreed}
        links.close()
        near.close()
    return facts


def _semantic(cfg: Config, inputs: Mapping[str, Artefact], folder: Path, found: _Copies, rt: Runtime) -> int:
    memory = cfg.memory_mb << 20
    if "embeddings" in inputs:
        table = semantic.read(inputs["embeddings"].path, found.ids, folder, memory)
    else:
        table = semantic.Embeddings(_embedded(cfg, inputs, folder, rt))
    groups = semantic.similar(
        table, found.ranks, cfg.semantic, cfg.groups, folder=folder, memory_bytes=memory
    )
    count = found.add("semantic", groups)
    table.close()
    return count


def _embedded(cfg: Config, inputs: Mapping[str, Artefact], folder: Path, rt: Runtime) -> Column:
    """float32: the corpus's embeddings by a model."""
    from caravan.stages._embed import Embedder

    embed = Embedder(inputs["model"], cfg.embed_tokens, rt)
    total, out = int(inputs["corpus"].facts.get("documents_out", 0)), Column(folder, np.float32)
    for batch in measure.document_batches(d for _, d in rewrite.read(inputs["corpus"].path)):
        made = embed([d.text for d in batch])
        out = out if len(out) else Column(folder, np.float32, made.shape[1])
        out.add(made)
        rt.report(len(out), total, "embeddings")
    return out


@dataclass(frozen=True)
class _Units:
    """texts -> their units, and with which of them sentences begin if these are compared."""

    unit: str

    def __call__(self, texts: Sequence[str]) -> list[tuple[units.Units, np.ndarray | None]]:
        out = []
        for part in units.portions(texts):
            cut = units.units(part, units.EVERYTHING)
            out.append((cut, sentences.begins(part, cut) if self.unit == "sentences" else None))
        return out

    def places(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """int64, int64: where they begin and end in a text."""
        if self.unit == "sentences":
            return sentences.spans(text)
        return units.units([text], units.EVERYTHING).spans(0)


_Copied = tuple[_Units, Span]
"""A span, and what it is counted in."""


def _spans(
    cfg: Config, cut: _Units, count: int, corpus: Artefact, folder: Path, found: _Copies, rt: Runtime
) -> Iterator[tuple[int, _Copied]]:
    """(place in the corpus, span that is a copy) among the texts that stay, places ascending. Spans of tokens
    and of sentences are looked for in the same texts, and the best ranked text that has a passage keeps it,
    so that both together lose nothing."""
    places, ranks = Column(folder, np.int64), dedup.Ranks(folder)
    for at, rules in found.rules.chunks():
        left = np.flatnonzero(rules == 0) + at
        places.add(left)
        ranks.add(*found.ranks.rows(left))
    search = substring.Spans(folder, count, cfg.memory_mb << 20)
    texts = (document.text for _, document in found.left(rewrite.read(corpus.path)))
    for parts in steps.mapped(cut, steps.batches(texts, len), steps.workers(rt.threads), rt.engine):
        for part, begins in parts:
            search.add(part, begins)
        rt.report(search.tokens, 0, cut.unit)
    for span in search.spans(ranks):
        place, origin = places.take(np.array([span.place, span.origin])).tolist()
        yield place, (cut, replace(span, origin=origin))
    for one in (search, ranks, places):
        one.close()


def _by_text(found: Sequence[Iterator[tuple[int, _Copied]]]) -> Iterator[tuple[int, list[_Copied]]]:
    """(place, its spans), places ascending; those found first before the others."""
    every = heapq.merge(*found, key=itemgetter(0))
    return ((place, [span for _, span in rows]) for place, rows in groupby(every, itemgetter(0)))


def _cut(
    cfg: Config, split: str, document: Document, spans: list[_Copied], names: Names,
    files: rewrite.Rewrite, cuts: Any, tally: Counter[str],
) -> None:  # fmt: skip
    origins = [span.origin for _, span in spans]
    ids = dict(zip(origins, names.take(np.array(origins)), strict=True))
    where = {cut: cut.places(document.text) for cut in dict.fromkeys(cut for cut, _ in spans)}
    gone: list[tuple[int, int]] = []
    for cut, span in spans:
        starts, ends = where[cut]
        first, last = int(starts[span.start]), int(ends[span.stop - 1])
        gone.append((first, last))
        row = {
            "id": document.id, "start": first, "stop": last, cut.unit: span.stop - span.start,
            "kept": ids[span.origin], "text": document.text[first : min(last, first + 200)],
        }  # fmt: skip
        cuts.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        if cut.unit == "sentences":
            tally["sentences"] += span.stop - span.start
    tally["tokens"] += _tokens(document.text, gone)
    text = substring.without(document.text, gone)
    tally.update(documents=1, spans=len(spans), chars=len(document.text) - len(text))
    if len(text) < cfg.min_chars:
        stay = sorted(set(ids.values()))
        reason = f"{len(text)} characters are left without spans of {', '.join(stay[:3])}, which stays"
        files.remove(document, Rejection("copied_spans", reason), kept=stay[0])
    else:
        files.keep(split, replace(document, text=text), document)


def _tokens(text: str, cuts: Sequence[tuple[int, int]]) -> int:
    """Words and marks inside cuts, each once, whatever the cuts are counted in."""
    starts, _ = _Units("tokens").places(text)
    inside = np.zeros(len(starts), np.bool_)
    for cut in cuts:
        first, stop = np.searchsorted(starts, cut).tolist()
        inside[first:stop] = True
    return int(inside.sum())
