"""Take benchmark questions out of a corpus, and say which questions stood in it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from caravan.data import benchmarks, rewrite, steps
from caravan.data import decontaminate as grams
from caravan.data.benchmarks import Wanted
from caravan.data.clean import Rejection
from caravan.data.columns import Column
from caravan.data.decontaminate import Hit
from caravan.stage import Runtime, series
from caravan.store import Artefact
from caravan.types import Document, UserError

INPUTS = {"corpus": "corpus", "benchmarks": "raw+"}
OUTPUT = "corpus"
USES: dict[str, str] = {}
VERSION = 2
SOURCES = 20
"""Sources named per benchmark in the report."""
DOCUMENTS = 10
"""Documents named per item."""
ACTIONS = ("drop", "cut", "mask", "report")


@dataclass(frozen=True, kw_only=True)
class Config:
    action: str = "drop"
    """drop removes documents with a match; cut takes out the match and its surroundings (GPT-3); mask writes
    … in its place; report changes nothing."""
    fewest_words: int = 8
    """Questions of fewer words are not looked for (words)."""
    common_documents: int = 10
    """13-grams in more documents than this are idioms, not contamination; 0 spares none. Copies are to be
    removed before."""
    common_items: int = 20
    """13-grams that more items of one benchmark share are its prompt's wording (items)."""
    around_chars: int = 200
    """cut: what goes with a match, on either side (characters)."""
    least_chars: int = 200
    """cut: shorter pieces go too (characters)."""
    most_cuts: int = 10
    """cut: documents cut more often are removed."""
    samples: int = 5
    """Matches shown per benchmark in the report, each of another document."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    if cfg.action not in ACTIONS:
        raise UserError(f"there is no action `{cfg.action}`", f"there are: {', '.join(ACTIONS)}")
    folders = tuple(str(folder.path) for folder in series(inputs, "benchmarks"))
    wanted = benchmarks.wanted_in(folders, cfg.fewest_words)
    if not any(wanted.checked):
        raise UserError(
            f"no item of the benchmarks has {cfg.fewest_words} words or more: nothing can be looked for",
            "give the files with the questions",
        )
    template = grams.template(wanted.index, wanted.owner_of, cfg.common_items)
    corpus = inputs["corpus"]
    found = Column(rt.work, np.int64, 4)  # (place, start, stop, n-gram) of every hit
    counts: Counter[int] = Counter()
    place, total = 0, int(corpus.facts.get("documents_out", 0))
    batches = steps.batches(rewrite.read(corpus.path), lambda row: len(row[1].text))
    for searched in steps.mapped(
        benchmarks.Search(folders, cfg.fewest_words), batches, steps.workers(rt.threads), rt.engine
    ):
        for one in searched:
            if one:
                found.add([(place, hit.start, hit.stop, hit.gram) for hit in one])
                counts.update({hit.gram for hit in one})
            place += 1
        rt.report(place, total, "documents")
    spared = template | grams.common(counts, cfg.common_documents)
    report = _Report(cfg, wanted)
    by_place = itertools.groupby(_rows(found), itemgetter(0))
    held, rows = next(by_place, (-1, iter(())))
    with rewrite.Rewrite(out) as files:
        for place, (split, document) in enumerate(rewrite.read(corpus.path)):
            hits = []
            if place == held:
                hits = [Hit(*row[1:]) for row in rows if row[3] not in spared]
                held, rows = next(by_place, (-1, iter(())))
            if not hits:
                files.keep(split, document)
                continue
            named = report.note(document, hits)
            _act(cfg, split, document, hits, named, files)
    found.close()
    page = report.page()
    (out / "contamination.json").write_bytes(orjson.dumps(page, option=orjson.OPT_INDENT_2))
    report.write_items(out / "items.jsonl")
    return {
        **files.facts(),
        "documents_hit": report.documents,
        "spared": {"template": len(template), "common": len(spared) - len(template)},
        "benchmarks": {
            name: {k: row[k] for k in ("items", "checked", "hit", "share", "documents")}
            for name, row in page.items()
        },
    }


def _rows(found: Column) -> Iterator[list[int]]:
    for _, part in found.chunks():
        yield from part.tolist()


@dataclass
class _Report:
    """What stood where: by item, and by benchmark."""

    cfg: Config
    wanted: Wanted
    documents: int = 0
    grams: dict[int, set[int]] = field(default_factory=dict)
    where: dict[int, list[str]] = field(default_factory=dict)
    sources: dict[str, Counter[str]] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def note(self, document: Document, hits: Sequence[Hit]) -> list[str]:
        """Names of the items that stand in a document."""
        self.documents += 1
        named: dict[int, Hit] = {}
        for hit in hits:
            for k in self.wanted.items_of(hit.gram):
                named.setdefault(k, hit)
                self.grams.setdefault(k, set()).add(hit.gram)
        for number, hit in sorted(named.items()):
            item = self.wanted.items[number]
            where = self.where.setdefault(number, [])
            if len(where) < DOCUMENTS:
                where.append(document.id)
            shown = self.samples.setdefault(item.benchmark, [])
            if len(shown) < self.cfg.samples and all(s["document"] != document.id for s in shown):
                text = document.text[max(0, hit.start - 60) : hit.stop + 60]
                shown.append({"item": item.id, "document": document.id, "text": text})
        for name in {self.wanted.items[number].benchmark for number in named}:
            self.sources.setdefault(name, Counter())[document.source] += 1
        items = (self.wanted.items[n] for n in sorted(named))
        return [f"{item.benchmark} {item.id}" for item in items]

    def page(self) -> dict[str, dict[str, Any]]:
        """By benchmark: items, those long enough, those found, their share of the checked; documents that
        hold any, the sources with most of them, samples."""
        rows: dict[str, dict[str, Any]] = {}
        for k, item in enumerate(self.wanted.items):
            row = rows.setdefault(item.benchmark, {"items": 0, "checked": 0, "hit": 0})
            row["items"] += 1
            row["checked"] += self.wanted.checked[k]
            row["hit"] += k in self.where
        for name, row in rows.items():
            row["share"] = round(row["hit"] / max(1, row["checked"]), 6)
            sources = self.sources.get(name, Counter[str]())
            row["documents"] = sources.total()
            row["sources"] = dict(sorted(sources.items(), key=lambda kv: (-kv[1], kv[0]))[:SOURCES])
            row["samples"] = self.samples.get(name, [])
        return dict(sorted(rows.items()))

    def write_items(self, path: Path) -> None:
        """One line per item, for leaving seen ones out of an evaluation: seen, the share of its words found,
        where."""
        with open(path, "wb") as file:
            for number, item in enumerate(self.wanted.items):
                found = self.grams.get(number)
                share = self.wanted.covered(number, found) if found else 0.0
                row = {
                    "benchmark": item.benchmark, "id": item.id, "checked": self.wanted.checked[number],
                    "seen": number in self.where, "share": round(share, 4),
                    "documents": self.where.get(number, []),
                }  # fmt: skip
                file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))


def _act(
    cfg: Config, split: str, document: Document, hits: Sequence[Hit], named: Sequence[str],
    files: rewrite.Rewrite,
) -> None:  # fmt: skip
    items = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
    if cfg.action == "report":
        files.keep(split, document)
    elif cfg.action == "mask":
        files.keep(split, replace(document, text=grams.masked(document.text, hits)), document)
    elif cfg.action == "drop":
        files.remove(document, Rejection("contaminated", f"holds {items}"), items=list(named[:20]))
    else:
        left, cuts = grams.pieces(document.text, hits, cfg.around_chars, cfg.least_chars)
        if left and cuts <= cfg.most_cuts:
            files.keep(split, replace(document, text="\n\n".join(left)), document)
            return
        reason = f"{cuts} cuts leave {sum(map(len, left))} characters; holds {items}"
        files.remove(document, Rejection("contaminated", reason), items=list(named[:20]))
