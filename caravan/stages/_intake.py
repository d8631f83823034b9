"""What `conversations` and `preferences` share: read files of any format, refuse, deduplicate, split, count.

A stage says what it expects of a thing and what counts as the same; the rest is here. Near duplicates are
found by the MinHash of `data/dedup`: 14 bands of 8 rows over 5-grams, compared by whole signatures.

What there is one of per record (its line, digest, rank, signature, id) lies on disk, so what is held does not
grow with the data.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from caravan.data import benchmarks, formats, langid, records
from caravan.data.columns import Column, Names
from caravan.data.decontaminate import FEWEST, template
from caravan.data.dedup import Links, NearDuplicates, Ranks, SameKey, Setting, signatures
from caravan.data.tools import joined, order_problem
from caravan.stage import Runtime, series
from caravan.store import Artefact
from caravan.types import Message, UserError

_BATCH = 256
_WORDING = 20
"""13-grams that more items of the benchmarks share are the wording of their prompts."""
_NAMED = 3
"""Items of benchmarks that the reason of a removal names."""
_REASONS = 1000
"""Reasons of quarantine that are told apart."""
SURE = 0.65
"""A language is counted under its name from this probability on, else as `und` (FineWeb's threshold)."""
Note = Callable[[np.ndarray, Sequence[bytes]], None]
"""Takes lines that no earlier one equals, with their numbers (see `Shelf.add`)."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    format: str = "auto"
    """Format of the files, by its name; auto: found out from the content of each."""
    turns: Literal["refuse", "join", "keep"] = "refuse"
    """What becomes of two turns of a user or the assistant in a row: quarantine, one turn, or nothing."""
    near_duplicates: Literal["count", "drop", "off"] = "count"
    """Whether to look for nearly equal texts, and to drop all but one of them."""
    similarity: float = 0.8
    """From this Jaccard similarity of 5-grams on (estimated) two texts are near duplicates."""
    contaminated: Literal["count", "drop"] = "drop"
    """What becomes of texts that hold an item of the benchmarks, where any are given."""
    max_chars: int = 200_000
    """Longer ones go to quarantine (characters)."""
    record_bytes: int = 16 << 20
    """Longer lines are not read but put into quarantine (bytes)."""
    memory_mb: int = 256
    """About what sorting may hold in memory (megabytes); the rest lies on disk. Changes no result."""


class Intake:
    """One run's reading: what was found, refused and counted, and the shelves that keep the rest."""

    def __init__(
        self, kind: str, cfg: Reading, inputs: Mapping[str, Artefact], out: Path, rt: Runtime
    ) -> None:
        self.kind, self.cfg, self.rt = kind, cfg, rt
        self.root = inputs["raw"].path
        self.quarantine = records.Quarantine(out / "quarantine.jsonl", self.root, rt.strict)
        self.counts: Counter[str] = Counter()
        self.added = 0
        """Lines on all shelves."""
        self.memory_bytes = cfg.memory_mb << 20
        self.benchmarks = Benchmarks(series(inputs, "benchmarks")) if "benchmarks" in inputs else None
        self._why: Counter[str] = Counter()
        self._chosen: dict[str, str] = {}
        self._out = out

    def found(self, unit: str) -> Iterator[formats.Found]:
        """Everything there is, counted."""
        limits = formats.Limits(record_bytes=self.cfg.record_bytes)
        for found in formats.read_all(self.root, self.kind, self._bad, limits, self._chosen, self.cfg.format):
            self.counts["read"] += 1
            yield found
            self.rt.report(self.counts["read"], 0, unit)

    def refuse(self, found: formats.Found, problem: str, shown: str) -> None:
        """Put something into quarantine."""
        self._bad(formats.Problem(self.root / found.file, found.place, problem, shown[:200]))

    def _bad(self, problem: formats.Problem) -> None:
        why = re.split(r" \(|, not |: ", problem.expected)[0][:80]
        if why in self._why or len(self._why) < _REASONS:  # some name what a record calls something
            self._why[why] += 1
        self.quarantine(problem)

    def ordered(self, messages: Sequence[Message]) -> tuple[tuple[Message, ...], str | None]:
        """The messages, joined where that was asked for, and what is wrong with their order."""
        if self.cfg.turns == "join":
            whole = joined(messages)
            self.counts["joined"] += len(whole) < len(messages)
            messages = whole
        return tuple(messages), order_problem(messages, repeats=self.cfg.turns == "keep")

    def shelf(self, name: str, suffix: str = ".jsonl") -> Shelf:
        """A place to keep things of one kind until they can be split."""
        return Shelf(name, suffix, self)

    def need(self, count: int, name: str) -> None:
        """Raise UserError if nothing is left."""
        if not count:
            facts = self.quarantine.facts()
            raise UserError(
                f"no {name} is left: {self.counts['read']} read, {self.quarantine.count} quarantined",
                (facts["quarantined_first"] or ["the files hold no records"])[0],
            )

    def facts(self) -> dict[str, Any]:
        """What was read and refused."""
        return {
            "files": len(self._chosen),
            "formats": dict(sorted(Counter(self._chosen.values()).items())),
            **self.quarantine.facts(),
            "quarantined_why": dict(self._why.most_common(20)),
        }


class Shelf:
    """Lines of one kind on disk, and which of them equal, resemble or hold what."""

    def __init__(self, name: str, suffix: str, intake: Intake) -> None:
        self.name, self.suffix, self._intake = name, suffix, intake
        self._cfg = intake.cfg
        self.work = folder = intake.rt.work
        self._spool = records.Spool(folder / f"{name}.jsonl")
        self._same = SameKey(folder, intake.memory_bytes)
        self._numbers = Column(folder, np.int64)
        self._near: NearDuplicates | None = None
        if self._cfg.near_duplicates != "off":
            setting = Setting(similarity=self._cfg.similarity)
            self._near = NearDuplicates(folder, setting, intake.memory_bytes)
        self._ranks, self._ids = Ranks(folder), Names(folder)
        self._held = Column(folder, np.int64, 1 + _NAMED)  # (place, items) of lines that hold any; -1: none
        self._waiting: list[_Waiting] = []
        self._looked = 0

    def add(self, line: bytes, name: str, digest: str, key: str, forced: str, text: str) -> None:
        """A line; of those with one `digest` the first stays. `name` is its id, `key` decides the split,
        `text` is what near duplicates and benchmark questions are looked for in. Lines are numbered as they
        come, over all shelves."""
        self._spool.add(line, key, forced)
        number, self._intake.added = self._intake.added, self._intake.added + 1
        self._waiting.append(_Waiting(number, name, digest, text, forced == "heldout"))
        if len(self._waiting) >= _BATCH:
            self._look()

    def close(self) -> None:
        """Remove what lies in the work folder, unread."""
        for _ in self._spool.split(0.0):
            pass
        self._same.close()
        self._close()

    def __len__(self) -> int:
        return len(self._spool)

    def _look(self) -> None:
        """Sign what waits, and look for benchmark items in it."""
        waiting, self._waiting = self._waiting, []
        texts = [one.text for one in waiting]
        self._numbers.add([one.number for one in waiting])
        self._same.add_digests([halves(one.digest) for one in waiting])
        if self._near is not None and waiting:
            self._near.add(signatures(texts, self._near.setting.places))
            self._ids.add(one.name for one in waiting)
            hashes = [halves(one.digest)[0] for one in waiting]
            self._ranks.add(hashes, list(map(len, texts)), [one.heldout for one in waiting])
        if self._intake.benchmarks is not None:
            for place, items in enumerate(self._intake.benchmarks.search(texts), self._looked):
                if items:
                    shown = (*items[:_NAMED], -1, -1, -1)[:_NAMED]
                    self._held.add([(place, *shown)])
        self._looked += len(waiting)

    def write(self, out: Path, heldout_share: float, note: Note) -> dict[str, int]:
        """train and heldout files, and removed.jsonl where something is; how many lines each, and what was
        left out. `note` sees every line but copies, in order."""
        counts: Counter[str] = Counter()
        batch: list[tuple[int, bytes]] = []
        with ExitStack() as stack:
            files = {n: stack.enter_context(open(out / f"{n}{self.suffix}", "wb")) for n in records.SPLITS}
            removed = None
            for number, split, line, near, items in self._unique(heldout_share):
                counts.update(unique=1, near_duplicates=bool(near), contaminated=bool(items))
                batch.append((number, line))
                if len(batch) >= _BATCH:
                    _noted(batch, note)
                if (why := self._why(near, items)) is None:
                    files[split].write(line)
                    counts[split] += 1
                    continue
                removed = removed or stack.enter_context(open(out / "removed.jsonl", "ab"))
                row = {"id": orjson.loads(line)["id"], "rule": why[0], "reason": why[1]}
                row["text"] = line[:500].decode("utf-8", "ignore")
                removed.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            _noted(batch, note)
        kept = {split: counts[split] for split in records.SPLITS}
        return {
            **kept,
            "duplicates": self._looked - counts["unique"],
            "near_duplicates": counts["near_duplicates"],
            **({"contaminated": counts["contaminated"]} if self._intake.benchmarks is not None else {}),
            "removed": counts["unique"] - sum(kept.values()),
        }

    def _why(self, near: str, items: Sequence[str]) -> tuple[str, str] | None:
        """(rule, reason) if a line goes."""
        if items and self._cfg.contaminated == "drop":
            return "benchmark", f"holds {', '.join(items)}"
        if near and self._cfg.near_duplicates == "drop":
            return "near duplicate", near
        return None

    def _unique(self, heldout_share: float) -> Iterator[tuple[int, str, bytes, str, Sequence[str]]]:
        """(number, split, line, what it resembles, items it holds) of every line that no earlier one equals,
        in the order of arrival."""
        self._look()
        repeated = self._same.repeated()
        resembling, holding = self._resembling(repeated), self._holding()
        copy, like = next(resembling, (-1, ""))
        holder, items = next(holding, (-1, ()))
        lines = self._spool.split(heldout_share, repeated)
        for at, chunk in repeated.chunks():
            marks = zip(chunk.tolist(), self._numbers[at : at + len(chunk)].tolist(), strict=True)
            for place, (again, number) in enumerate(marks, at):
                split, line = next(lines)
                near, held = like if place == copy else "", items if place == holder else ()
                if near:
                    copy, like = next(resembling, (-1, ""))
                if held:
                    holder, items = next(holding, (-1, ()))
                if not again:
                    yield number, split, line, near, held
        for _ in lines:  # none is left; this removes the file
            raise AssertionError("more lines than keys")
        repeated.close()
        self._close()

    def _resembling(self, repeated: Column) -> Iterator[tuple[int, str]]:
        """(place of each near duplicate, what it resembles), places ascending."""
        if self._near is None:
            return
        links = Links(len(self._ranks), self.work)
        self._near.link(self._ranks, links, repeated)
        for copies, stays in links.pairs(self._ranks):
            names, alike = self._ids.take(stays), self._near.estimate(copies, stays).tolist()
            for place, name, share in zip(copies.tolist(), names, alike, strict=True):
                yield place, f"resembles {name}, which stays ({share:.2f})"
        links.close()

    def _holding(self) -> Iterator[tuple[int, Sequence[str]]]:
        """(place, names of benchmark items, the first few) of every line that holds any."""
        for _, rows in self._held.chunks():
            for place, *items in rows.tolist():
                assert self._intake.benchmarks is not None
                yield place, [self._intake.benchmarks.name(item) for item in items if item >= 0]

    def _close(self) -> None:
        for column in (self._numbers, self._held, self._ranks, self._ids, self._near):
            if column is not None:
                column.close()


@dataclass(frozen=True, slots=True)
class _Waiting:
    """What a shelf must know of a line."""

    number: int
    name: str
    digest: str
    text: str
    heldout: bool


def _noted(batch: list[tuple[int, bytes]], note: Note) -> None:
    """Hand a batch over, and forget it."""
    note(np.array([number for number, _ in batch], np.int64), [line for _, line in batch])
    batch.clear()


def halves(digest: str) -> tuple[int, int]:
    """A digest of 32 hex digits as two numbers of 64 bits."""
    return int(digest[:16], 16), int(digest[16:], 16)


class Benchmarks:
    """Items that must not be in training text (`data/benchmarks.py`), and which of them a text holds."""

    def __init__(self, folders: Sequence[Artefact]) -> None:
        self._wanted = benchmarks.wanted_in(tuple(str(folder.path) for folder in folders), FEWEST)
        self._spared = template(self._wanted.index, self._wanted.owner_of, _WORDING)

    def search(self, texts: Sequence[str]) -> list[list[int]]:
        """Numbers of the items that each text holds, ascending; n-grams that are a prompt's wording rather
        than an item's are not looked at."""
        out = []
        for hits in self._wanted.index.search(texts):
            grams = {hit.gram for hit in hits} - self._spared
            out.append(sorted({item for gram in grams for item in self._wanted.items_of(gram)}))
        return out

    def name(self, number: int) -> str:
        """Benchmark and id of an item."""
        item = self._wanted.items[number]
        return f"{item.benchmark} {item.id}"


class Sizes:
    """Lengths, and how they are spread: how many there are of each, so that only the longest costs memory."""

    def __init__(self) -> None:
        self._count = np.zeros(1 << 10, np.int64)

    def add(self, size: int) -> None:
        if size >= len(self._count):
            more = max(size + 1 - len(self._count), len(self._count))
            self._count = np.concatenate([self._count, np.zeros(more, np.int64)])
        self._count[size] += 1

    def facts(self) -> dict[str, int]:
        """Median, 90th and 99th percentile (the lower of two neighbours), and the largest."""
        total = int(self._count.sum())
        if not total:
            return {}
        points = (50, 90, 99)
        rank = np.floor((total - 1) * np.true_divide(points, 100))
        at = np.searchsorted(np.cumsum(self._count), rank, side="right")
        largest = int(np.flatnonzero(self._count)[-1])
        return {**{f"p{p}": int(v) for p, v in zip(points, at, strict=True)}, "max": largest}


class Languages:
    """Languages of texts, guessed in batches."""

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._counts: Counter[str] = Counter()

    def add(self, text: str) -> None:
        self._waiting.append(text[:1000])
        if len(self._waiting) >= _BATCH:
            self._guess()

    def _guess(self) -> None:
        for guess in langid.guesses(self._waiting):
            self._counts[guess.lang if guess.score >= SURE else "und"] += 1
        self._waiting = []

    def facts(self) -> dict[str, int]:
        """The most frequent first; of equals, by name, so that no order of reading shows."""
        self._guess()
        return dict(sorted(self._counts.items(), key=lambda kv: (-kv[1], kv[0]))[:20])
