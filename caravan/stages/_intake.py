"""What `conversations` and `preferences` share: read files of any format, refuse, deduplicate, split, count.

A stage says what it expects of a thing and what counts as the same; the rest is here. Near duplicates are
found by the MinHash of `data/dedup`: 14 bands of 8 rows over 5-grams, compared by whole signatures.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from caravan.data import formats, langid, records
from caravan.data.dedup import Links, NearDuplicates, Ranks, Setting, signatures
from caravan.data.tools import joined, order_problem
from caravan.stage import Runtime, series
from caravan.store import Artefact
from caravan.types import Message, UserError

_BATCH = 256
_MEMORY = 256 << 20
_WORDING = 20
"""13-grams that more items of the benchmarks share are the wording of their prompts."""
SURE = 0.65
"""A language is counted under its name from this probability on, else as `und` (FineWeb's threshold)."""


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


class Intake:
    """One run's reading: what was found, refused and counted, and the shelves that keep the rest."""

    def __init__(
        self, kind: str, cfg: Reading, inputs: Mapping[str, Artefact], out: Path, rt: Runtime
    ) -> None:
        self.kind, self.cfg, self.rt = kind, cfg, rt
        self.root = inputs["raw"].path
        self.quarantine = records.Quarantine(out / "quarantine.jsonl", self.root, rt.strict)
        self.counts: Counter[str] = Counter()
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
        self._why[re.split(r" \(|, not |: ", problem.expected)[0][:80]] += 1
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
    """Lines of one kind on disk: without those met before, with signatures to find near duplicates by."""

    def __init__(self, name: str, suffix: str, intake: Intake) -> None:
        self.name, self.suffix, self._intake = name, suffix, intake
        self._cfg = intake.cfg
        self.work = intake.rt.work
        self._spool = records.Spool(self.work / f"{name}.jsonl")
        self._known: set[str] = set()
        self._waiting: list[str] = []
        self.counts: Counter[str] = Counter()
        self._near: NearDuplicates | None = None
        if self._cfg.near_duplicates != "off":
            setting = Setting(similarity=self._cfg.similarity)
            self._near = NearDuplicates(_folder(self.work / f"{name}-near"), setting, _MEMORY)
        self._ranks = Ranks()
        self._ids: list[str] = []
        self._held: dict[int, set[int]] = {}
        self._looked = 0

    def add(self, line: bytes, name: str, digest: str, key: str, forced: str, text: str) -> bool:
        """Keep a line unless an equal one (by `digest`) is here; `name` is its id, `key` decides the split,
        `text` is what near duplicates and benchmark questions are looked for in. Says whether it is new."""
        if digest in self._known:
            self.counts["duplicates"] += 1
            return False
        self._known.add(digest)
        self._spool.add(line, key, forced)
        if self._near is not None:
            self._ids.append(name)
        self._ranks.add([int(digest[:16], 16)], [len(text)], [forced == "heldout"])
        self._waiting.append(text)
        if len(self._waiting) >= _BATCH:
            self._look()
        return True

    def close(self) -> None:
        """Remove what lies in the work folder, unread."""
        for _ in self._spool.split(0.0):
            pass
        if self._near is not None:
            self._near.close()
            (self.work / f"{self.name}-near").rmdir()

    def __len__(self) -> int:
        return len(self._spool)

    def _look(self) -> None:
        """Sign what waits, and look for benchmark items in it."""
        if self._near is not None and self._waiting:
            self._near.add(signatures(self._waiting, self._near.setting.places))
        if self._intake.benchmarks is not None:
            for place, found in enumerate(self._intake.benchmarks.search(self._waiting), self._looked):
                if found:
                    self._held[place] = found
        self._looked += len(self._waiting)
        self._waiting = []

    def write(self, out: Path, heldout_share: float) -> dict[str, int]:
        """train and heldout files, and removed.jsonl where something is; how many lines each, and what was
        left out."""
        self._look()
        found = self._near_duplicates()
        drop = self._cfg.near_duplicates == "drop"
        reasons = {place: ("near duplicate", why) for place, why in found.items() if drop}
        seen = self._intake.benchmarks.named(self._held) if self._intake.benchmarks is not None else {}
        if self._cfg.contaminated == "drop":
            reasons |= {
                place: ("benchmark", f"holds {', '.join(names[:3])}") for place, names in seen.items()
            }
        counts = dict.fromkeys(records.SPLITS, 0)
        files = {split: open(out / f"{split}{self.suffix}", "wb") for split in records.SPLITS}  # noqa: SIM115
        removed = open(out / "removed.jsonl", "ab") if reasons else None  # noqa: SIM115
        for place, (split, line) in enumerate(self._spool.split(heldout_share)):
            if place in reasons and removed is not None:
                rule, why = reasons[place]
                row = {"id": orjson.loads(line)["id"], "rule": rule, "reason": why}
                row["text"] = line[:500].decode("utf-8", "ignore")
                removed.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
                continue
            files[split].write(line)
            counts[split] += 1
        for file in [*files.values(), *([removed] if removed else [])]:
            file.close()
        return {
            **counts,
            "duplicates": self.counts["duplicates"],
            "near_duplicates": len(found),
            **({"contaminated": len(seen)} if self._intake.benchmarks is not None else {}),
            "removed": len(reasons),
        }

    def _near_duplicates(self) -> dict[int, str]:
        """Place of each near duplicate, and what it resembles."""
        if self._near is None:
            return {}
        links = Links(len(self._spool))
        if len(self._spool):
            self._near.link(self._ranks, links)
        copies, stays = links.clusters(self._ranks)
        alike = self._near.estimate(copies, stays) if len(copies) else np.zeros(0)
        self._near.close()
        (self.work / f"{self.name}-near").rmdir()
        return {
            int(a): f"resembles {self._ids[int(b)]}, which stays ({share:.2f})"
            for a, b, share in zip(copies, stays, alike, strict=True)
        }


class Benchmarks:
    """Items that must not be in training text: their 13-grams (`data/decontaminate.py`), and who has them."""

    def __init__(self, folders: Sequence[Artefact]) -> None:
        from caravan.data import benchmarks
        from caravan.data.decontaminate import Index, template

        self._index = Index()
        self._items: list[str] = []
        self._owner_of: list[int] = []
        for folder in folders:
            for item in benchmarks.read(folder.path):
                for text in item.texts:
                    self._index.add(text)
                    self._owner_of.append(len(self._items))
                self._items.append(f"{item.benchmark} {item.id}")
        self._spared = template(self._index, self._owner_of, _WORDING)

    def search(self, texts: Sequence[str]) -> list[set[int]]:
        """n-grams of items in each text; those that are a prompt's wording rather than an item's are not
        looked at."""
        return [{hit.gram for hit in hits} - self._spared for hits in self._index.search(texts)]

    def named(self, held: Mapping[int, set[int]]) -> dict[int, list[str]]:
        """Place of a text -> the items it holds."""
        return {
            place: [
                self._items[item]
                for item in sorted({self._owner_of[t] for g in found for t in self._index.owners(g)})
            ]
            for place, found in held.items()
        }


class Sizes:
    """Lengths, and how they are spread."""

    def __init__(self) -> None:
        self._held = array("q")

    def add(self, size: int) -> None:
        self._held.append(size)

    def facts(self) -> dict[str, int]:
        """Median, 90th and 99th percentile, and the largest."""
        if not len(self._held):
            return {}
        held = np.frombuffer(self._held, np.int64)
        at = np.percentile(held, (50, 90, 99), method="lower")
        return {**{f"p{p}": int(v) for p, v in zip((50, 90, 99), at, strict=True)}, "max": int(held.max())}


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
        """The most frequent first."""
        self._guess()
        return dict(self._counts.most_common(20))


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
