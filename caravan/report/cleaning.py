"""What was done to a corpus on its way, read from facts and removal lists of everything it was made
from.

Memory does not grow with the corpus: counts by rule, source and length, and a few texts drawn by a hash of
their ids. What an artefact does not hold is left out.
"""

from __future__ import annotations

import csv
import heapq
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from caravan.data import records
from caravan.report import read
from caravan.report.plots import Histogram
from caravan.store import Artefact, Store
from caravan.types import UserError

MOST_NAMES = 100_000
"""Sources, or copied texts, counted at a time; the rarest are forgotten when there are more."""
MOST_CLUSTERS, MOST_MEMBERS, MOST_SAMPLES = 8, 5, 3
LICENCE_FILES = ("licence", "license", "copying", "notice")


@dataclass(frozen=True, kw_only=True, order=True)
class Text:
    """A document shown on the page."""

    draw: int
    """Hash of its id: the smallest are shown, whatever their order."""
    id: str
    source: str
    text: str
    reason: str = ""
    lang: str = ""


@dataclass(kw_only=True)
class Gone:
    """What one rule of one step took."""

    documents: int = 0
    bytes: int | None = 0
    """None if the removal list does not say."""
    shown: list[Text] = field(default_factory=list)


@dataclass(kw_only=True)
class Step:
    """One corpus of the road and what was lost in making it from the one before."""

    art: Artefact
    label: str
    gone: dict[str, Gone]
    copies: Counter[str]
    """Id of a text that stayed -> texts removed as copies of it."""

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.art.facts

    @property
    def edited(self) -> int | None:
        """Bytes that went from documents that stayed (below zero: that came); None if unknown."""
        if any(g.bytes is None for g in self.gone.values()):
            return None
        lost = sum(g.bytes or 0 for g in self.gone.values())
        return int(self.facts.get("bytes_in", 0)) - int(self.facts.get("bytes_out", 0)) - lost


def chain(store: Store, art: Artefact) -> list[Artefact]:
    """The corpora on the way to this one, the first made from raw files first."""
    way = [art]
    while above := way[0].inputs.get("corpus"):
        if not above.startswith("corpus/") or not store.has(above):
            break
        way.insert(0, store.open(above))
    return way


def step(art: Artefact) -> Step:
    """Facts and removal list of one corpus."""
    gone: dict[str, Gone] = {
        str(rule): Gone(documents=int(count), bytes=None)
        for rule, count in art.facts.get("removed", {}).items()
    }
    copies: Counter[str] = Counter()
    drawn: dict[str, list[tuple[int, int, Text]]] = {}
    seen: set[str] = set()
    for n, row in enumerate(_rows(art / "removed.jsonl.zst")):
        rule = str(row.get("rule", "unknown"))
        one = gone.setdefault(rule, Gone(documents=0, bytes=None))
        if rule not in seen:
            seen.add(rule)
            one.documents, one.bytes = 0, 0
        one.documents += 1
        size = row.get("bytes")
        one.bytes = None if one.bytes is None or not isinstance(size, int) else one.bytes + size
        if kept := row.get("kept"):
            copies[str(kept)] += 1
            _forget(copies)
        _keep(drawn.setdefault(rule, []), n, _text(row), MOST_SAMPLES)
    for rule, some in drawn.items():
        gone[rule].shown = _ordered(some)
    ordered = sorted(gone.items(), key=lambda item: (-item[1].documents, item[0]))
    return Step(art=art, label=read.label(art), gone={k: g for k, g in ordered if g.documents}, copies=copies)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    return (row for row in records.read_lines(path) if isinstance(row, dict)) if path.is_file() else iter(())


def _text(row: Mapping[str, Any]) -> Text:
    ident = str(row.get("id", ""))
    return Text(
        draw=zlib.crc32(ident.encode()),
        id=ident,
        source=str(row.get("source", "")),
        text=read.clip(str(row.get("text", "")), 400),
        reason=str(row.get("reason", "")),
        lang=str(row.get("lang", "")),
    )


def _keep(heap: list[tuple[int, int, Text]], n: int, text: Text, most: int) -> None:
    """Hold the texts of the smallest draws."""
    heapq.heappush(heap, (-text.draw, -n, text))
    if len(heap) > most:
        heapq.heappop(heap)


def _ordered(heap: Iterable[tuple[int, int, Text]]) -> list[Text]:
    return [text for *_, text in sorted(heap, key=lambda x: (-x[0], -x[1]))]


def _forget(counts: Counter[str]) -> None:
    if len(counts) > 2 * MOST_NAMES:
        for name, _ in counts.most_common()[MOST_NAMES:]:
            del counts[name]


@dataclass(kw_only=True)
class Cluster:
    """A text that stayed, and some of its copies."""

    id: str
    count: int
    """Copies removed."""
    kept: Text | None = None
    copies: list[Text] = field(default_factory=list)


def clusters(steps: Iterable[Step]) -> list[Cluster]:
    """The largest, with some of their members; the texts that stayed are put in by `census`."""
    counts: Counter[str] = Counter()
    for one in steps:
        counts.update(one.copies)
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_CLUSTERS]
    found = {ident: Cluster(id=ident, count=count) for ident, count in order}
    for one in steps:
        for row in _rows(one.art / "removed.jsonl.zst") if one.copies else ():
            cluster = found.get(str(row.get("kept", "")))
            if cluster and len(cluster.copies) < MOST_MEMBERS:
                cluster.copies.append(_text(row))
    return list(found.values())


@dataclass(kw_only=True)
class Census:
    """What the documents of a corpus are like. Counts of a part of them are scaled up."""

    sources: Counter[str] = field(default_factory=Counter)
    bytes_by_source: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    """Tenths of the decimal logarithm of a document's characters -> documents."""
    shown: list[Text] = field(default_factory=list)
    looked_at: int = 0
    every: int = 1
    """One document in so many was looked at."""


def census(art: Artefact, wanted: Mapping[str, Cluster], most: int) -> Census:
    """Look at about `most` documents of the corpus, evenly spread, and at those whose id is wanted."""
    total = int(art.facts.get("documents_out", 0))
    out = Census(every=max(1, -(-total // most)))
    drawn: list[tuple[int, int, Text]] = []
    for split in records.SPLITS:
        for n, row in enumerate(_rows(art / f"{split}.jsonl.zst")):
            if (cluster := wanted.get(row["id"])) and cluster.kept is None:
                cluster.kept = _text(row)
            if n % out.every:
                continue
            out.looked_at += 1
            source = _source(row["source"])
            out.sources[source] += 1
            out.bytes_by_source[source] += len(row["text"].encode("utf-8", "replace"))
            out.lengths[math.floor(10 * math.log10(max(1, len(row["text"]))))] += 1
            _keep(drawn, n, _text(row), 2 * MOST_SAMPLES)
            if len(out.sources) > 2 * MOST_NAMES:
                _forget(out.sources)
                out.bytes_by_source = Counter({k: out.bytes_by_source[k] for k in out.sources})
    out.shown = _ordered(drawn)
    return out


def _source(source: str) -> str:
    """The host of an address, else the source as it is."""
    if "://" in source:
        host = urlsplit(source).hostname if source.isascii() else None
        return host or source.split("://", 1)[1].partition("/")[0]
    return source


def domain(source: str) -> str:
    """What sources are counted by: the host of an address, or the folder of a file (two levels at most)."""
    path = PurePosixPath(source)
    return (
        "/".join(path.parts[:2]) if len(path.parts) > 2 else (str(path.parent) if "/" in source else source)
    )


def lengths(found: Census) -> Histogram | None:
    """Documents by characters."""
    if not found.lengths:
        return None
    low, high = min(found.lengths), max(found.lengths) + 1
    return Histogram(
        name="length of documents",
        note="characters",
        edges=tuple(10 ** (k / 10) for k in range(low, high + 1)),
        counts=tuple(found.lengths[k] for k in range(low, high)),
        log=True,
    )


def licences(raw: Iterable[Artefact], found: Census) -> list[dict[str, Any]]:
    """Licence -> documents, bytes and sources under it. Where the raw files hold a table with the columns
    `path` and `licence` (MANIFEST.tsv or .csv) that is believed; else a licence in the raw artefact's facts;
    else a LICENCE file in the source's folder or above it."""
    stores = list(raw)
    stated: dict[str, str] = {}
    for art in stores:
        stated |= _table(art)
    rows: dict[str, dict[str, Any]] = {}
    for source, count in found.sources.items():
        name = stated.get(source) or _beside(stores, source)
        row = rows.setdefault(name, {"licence": name, "documents": 0, "bytes": 0, "sources": Counter()})
        row["documents"] += count * found.every
        row["bytes"] += found.bytes_by_source[source] * found.every
        row["sources"][domain(source)] += count
    for row in rows.values():
        row["sources"] = [name for name, _ in row["sources"].most_common(6)]
    return sorted(rows.values(), key=lambda row: (-row["bytes"], row["licence"]))


def _table(art: Artefact) -> dict[str, str]:
    for name in ("MANIFEST.tsv", "MANIFEST.csv"):
        path = art / name
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace", newline="") as file:
                rows = csv.DictReader(file, delimiter="\t" if name.endswith("tsv") else ",")
                return {
                    str(r["path"]): str(r.get("licence") or r.get("license") or "")
                    for r in rows
                    if r.get("path")
                }
    return {}


def _beside(stores: Iterable[Artefact], source: str) -> str:
    for art in stores:
        if stated := art.facts.get("licence") or art.facts.get("license"):
            return str(stated)
        files = art.manifest.get("files", {})
        for folder in PurePosixPath(source).parents:
            for name in files:
                path = PurePosixPath(name)
                if path.parent == folder and path.stem.lower() in LICENCE_FILES:
                    return f"see {name}"
    return "not stated"


@dataclass(frozen=True)
class Contamination:
    """Where items of a benchmark stood in the text."""

    name: str
    where: list[tuple[str, int]]
    """(host or folder, documents of it that hold any), the most first."""
    shown: list[Text]


def contaminations(art: Artefact, most: int = 3) -> list[Contamination]:
    """Benchmarks found in the text, as contamination.json tells, those with the most items found first."""
    path = art / "contamination.json"
    try:
        page = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as problem:
        raise UserError(
            f"cannot read {path.name}: {problem}", "`caravan verify` tells what is whole"
        ) from problem
    out = []
    for name, row in sorted(page.items(), key=lambda item: (-int(item[1].get("hit", 0)), item[0])):
        where: Counter[str] = Counter()
        for source, documents in row.get("sources", {}).items():
            where[domain(str(source)) or "(not said)"] += int(documents)
        shown = [
            Text(draw=0, id="", source=f"item {s.get('item')}", text=read.clip(str(s.get("text", "")), 400),
                 reason=f"in {s.get('document')}")
            for s in row.get("samples", ())[:most]
        ]  # fmt: skip
        if shown:
            order = sorted(where.items(), key=lambda item: (-item[1], item[0]))
            out.append(Contamination(str(name), order, shown))
    return out
