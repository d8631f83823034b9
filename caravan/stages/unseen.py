"""Leave out of benchmarks what stands in the text a model was trained on: `decontaminate` the other way
round.

What comes out are the same files without the items found, to be given to `evaluate` or to anything else that
reads them, and removed.jsonl.zst, which says of each item that went where it stood and how much of it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from caravan.data import benchmarks, records, steps
from caravan.data import decontaminate as grams
from caravan.data.benchmarks import Wanted
from caravan.data.decontaminate import Hit
from caravan.stage import Runtime, series
from caravan.store import Artefact
from caravan.types import Document, UserError

INPUTS = {"benchmarks": "raw+", "texts": "corpus|conversations+"}
OUTPUT = "raw"
USES: dict[str, str] = {}
VERSION = 1


Row = tuple[str, Document]
"""The input a document is in, and the document."""


@dataclass(frozen=True, kw_only=True)
class Config:
    least_share: float = 0.0
    """Items of which a smaller share of the words is found stay; 0 leaves out every item with a match
    (share)."""
    fewest_words: int = 8
    """Questions of fewer words are not looked for, and stay (words)."""
    common_documents: int = 10
    """13-grams in more documents than this are idioms, not contamination; 0 spares none."""
    common_items: int = 20
    """13-grams that more items share are a prompt's wording (items)."""
    places: int = 3
    """Documents named per item."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    folders = tuple(str(folder.path) for folder in series(inputs, "benchmarks"))
    wanted = benchmarks.wanted_in(folders, cfg.fewest_words)
    if not wanted.items:
        raise UserError("the benchmarks hold no items", "give the files with the questions")
    texts = series(inputs, "texts")
    search = benchmarks.Search(folders, cfg.fewest_words)
    batches = steps.batches(_read(texts), lambda row: len(row[1].text))
    seen = _Seen(cfg.places)
    for batch, found in _searched(search, batches, rt):
        seen.note(batch, found)
        rt.report(seen.documents, 0, "documents")
    spared = grams.template(wanted.index, wanted.owner_of, cfg.common_items)
    spared |= grams.common(seen.counts, cfg.common_documents)
    gone = _gone(wanted, set(seen.counts) - spared, cfg.least_share)
    if len(gone) == len(wanted.items):
        raise UserError(
            f"nothing is left: all {len(gone)} items stand in the texts",
            "see --least-share for a milder rule",
        )
    _write(out, wanted, gone, seen)
    return {
        "items_in": len(wanted.items),
        "items_out": len(wanted.items) - len(gone),
        "documents_read": seen.documents,
        "removed": {"seen": len(gone)},
        "benchmarks": _table(wanted, gone),
    }


def _searched(
    search: benchmarks.Search, batches: Iterable[list[Row]], rt: Runtime
) -> Iterator[tuple[list[Row], list[list[Hit]]]]:
    """(batch, its hits). The batch is needed again for what it says of each document; those on their way wait
    here (`itertools.tee` would keep up to 57 that have been seen)."""
    waiting: deque[list[Row]] = deque()

    def sent() -> Iterator[list[Row]]:
        for batch in batches:
            waiting.append(batch)
            yield batch

    for found in steps.mapped(search, sent(), steps.workers(rt.threads), rt.engine):
        yield waiting.popleft(), found


def _read(texts: Sequence[Artefact]) -> Iterator[Row]:
    """(name of the input, document) of all training texts; what was held out was not learned from."""
    for art in texts:
        if art.kind == "corpus":
            for document in records.read_documents(art / "train.jsonl.zst"):
                yield art.ref, document
            continue
        for chat in records.read_conversations(art / "train.jsonl"):
            text = "\n".join(message.content for message in chat.messages)
            yield art.ref, Document(id=chat.id, text=text, source=chat.source)


Place = tuple[str, str, str]
"""A document's id, its source, and the input it is in."""


@dataclass
class _Seen:
    """Which n-grams stood where: memory in proportion to the benchmarks, however long the texts are."""

    places: int
    documents: int = 0
    counts: Counter[int] = field(default_factory=Counter)
    first: dict[int, list[Place]] = field(default_factory=dict)

    def note(self, batch: Sequence[Row], found: Sequence[Sequence[Hit]]) -> None:
        for (ref, document), hits in zip(batch, found, strict=True):
            self.documents += 1
            once = {hit.gram for hit in hits}
            self.counts.update(once)
            place = (document.id, document.source, ref)
            for gram in once:
                shown = self.first.setdefault(gram, [])
                if len(shown) < self.places:
                    shown.append(place)


def _gone(wanted: Wanted, found: set[int], least_share: float) -> dict[int, tuple[float, list[int]]]:
    """Number of an item that goes -> (share of its words found, n-grams found, in order of place)."""
    out: dict[int, tuple[float, list[int]]] = {}
    for number, texts in enumerate(wanted.texts_of):
        own = [gram for text in texts for gram in wanted.index.grams(text) if gram in found]
        if own and (share := wanted.covered(number, found)) >= least_share:
            out[number] = (share, own)
    return out


def _write(out: Path, wanted: Wanted, gone: Mapping[int, tuple[float, list[int]]], seen: _Seen) -> None:
    """The files without what goes, under their own names, and removed.jsonl.zst."""
    with records.packed_writer(out / benchmarks.REMOVED) as removed:
        for folder, name, path, numbers in wanted.files:
            for number in numbers:
                if number in gone:
                    row = _row(wanted, number, *gone[number], seen)
                    removed.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            target = out / name if not (out / name).exists() else out / str(folder + 1) / name
            benchmarks.without(path, target, {n - numbers.start for n in numbers if n in gone})


def _row(wanted: Wanted, number: int, share: float, own: Sequence[int], seen: _Seen) -> dict[str, Any]:
    item = wanted.items[number]
    places = list(dict.fromkeys(place for gram in own for place in seen.first[gram]))[: seen.places]
    more = max(seen.counts[gram] for gram in own) - 1
    reason = f"{share:.0%} of its words stand in {places[0][0]}" + (f" and {more} more" if more else "")
    return {
        "id": item.id, "source": item.benchmark, "rule": "seen", "reason": reason, "share": round(share, 4),
        "documents": [dict(zip(("id", "source", "in"), place, strict=True)) for place in places],
        "text": max(item.texts, key=len)[:500],
    }  # fmt: skip


def _table(wanted: Wanted, gone: Mapping[int, Any]) -> dict[str, dict[str, Any]]:
    """By benchmark: items, those long enough to be looked for, those left out and their share of these."""
    rows: dict[str, dict[str, Any]] = {}
    for number, item in enumerate(wanted.items):
        row = rows.setdefault(item.benchmark, {"items": 0, "checked": 0, "hit": 0})
        row["items"] += 1
        row["checked"] += wanted.checked[number]
        row["hit"] += number in gone
    for row in rows.values():
        row["share"] = round(row["hit"] / max(1, row["checked"]), 6)
    return dict(sorted(rows.items()))
