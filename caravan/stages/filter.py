"""Apply rules to a corpus: Gopher's, C4's, FineWeb's, RefinedWeb's, Chinese ones, or your own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from caravan.data import badwords, lines, measure, records, rules, signals, steps
from caravan.data.clean import Rejection
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.types import Document, UserError

INPUTS = {"corpus": "corpus", "signals": "signals?", "own": "raw?", "bad_words": "raw?"}
OUTPUT = "corpus"
USES: dict[str, str] = {}
VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Config:
    rules: tuple[str, ...] = ("gopher",)
    """Rule sets in the order they are applied: gopher, c4, c4_code, fineweb, refinedweb, chinese, pareto,
    or a file given with --own."""
    limits: tuple[str, ...] = ()
    """Other limits than the published ones, as RULE.at_least=NUMBER (or at_most, more_than, less_than)."""
    off: tuple[str, ...] = ()
    """Rules to leave out, by name."""
    edit_lines: bool = True
    """Let the sets that filter lines (c4, fineweb, refinedweb) do so in the documents that stay."""
    seed: int = 0
    """Seed of rules that draw (pareto); the draw is a hash of it and the document's id."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    own = inputs["own"].path if "own" in inputs else None
    sets = rules.changed(rules.load(cfg.rules, own), cfg.limits, cfg.off)
    words = badwords.read(inputs["bad_words"].path) if "bad_words" in inputs else None
    sift = _Sift(cfg, sets, words)
    kept: Counter[str] = Counter()
    languages: dict[str, Counter[str]] = {}
    total = int(inputs["corpus"].facts.get("documents_out", 0))
    with records.packed_writer(out / "removed.jsonl.zst") as removed:
        for split in records.SPLITS:
            with records.packed_writer(out / f"{split}.jsonl.zst") as file:
                for documents, table in _measured(sift, inputs, split, rt):
                    for document, verdict in sift(documents, table):
                        if verdict is not None:
                            removed.write(records.dump_removed(document, verdict))
                            continue
                        file.write(records.dump(document))
                        size = len(document.text.encode("utf-8", "replace"))
                        kept[split] += 1
                        kept[f"{split}_bytes"] += size
                        languages.setdefault(document.lang, Counter()).update(documents=1, bytes=size)
                    rt.report(sift.seen, total, "documents")
    (out / "quarantine.jsonl").touch()
    if not kept["train"]:
        why = ", ".join(f"{n} by {name}" for name, n in sift.removed.most_common(5))
        raise UserError(f"the rules left nothing of {sift.seen} documents: {why}", "see --limits and --off")
    count = kept["train"] + kept["heldout"]
    return {
        "documents_in": sift.seen,
        "documents_out": count,
        "bytes_in": sift.bytes_in,
        "bytes_out": kept["train_bytes"] + kept["heldout_bytes"],
        **{k: kept[k] for k in ("train", "heldout", "train_bytes", "heldout_bytes")},
        "heldout_share": round(kept["heldout"] / count, 4),
        "languages": {k: dict(v) for k, v in sorted(languages.items())},
        "removed": dict(sorted(sift.removed.items())),
        "removed_samples": dict(sorted(sift.samples.items())),
        "rules": sift.facts(),
        "lines": {k: dict(v) for k, v in sift.edited.items()},
        "bad_words": {k or "all": len(v) for k, v in words.lists.items()} if words else {},
    }


def _measured(
    sift: _Sift, inputs: Mapping[str, Artefact], split: str, rt: Runtime
) -> Iterator[tuple[list[Document], dict[str, np.ndarray]]]:
    """Documents with the signals the rules need: read, or computed on the way if none were given."""
    path = inputs["corpus"] / f"{split}.jsonl.zst"
    texts = measure.document_batches(records.read_documents(path))
    if "signals" not in inputs:
        for name in sift.needed:
            if not signals.families_of([name]):
                raise UserError(f"the rules need `{name}`", measure.how(name))
        again = measure.document_batches(records.read_documents(path))
        work = measure.Measure(signals.families_of(sift.needed))
        yield from zip(texts, steps.mapped(work, again, steps.workers(rt.threads), rt.engine), strict=True)
        return
    rows: measure.Reader | None = None
    for documents in texts:
        rows = rows or measure.Reader(inputs["signals"] / f"{split}.parquet", sift.needed)
        table = rows.take(len(documents))
        if [d.id for d in documents] != list(table.get("id", ())):
            raise UserError(
                "these signals are of another corpus", "make them with `caravan signals --corpus`"
            )
        yield documents, table


class _Sift:
    """Rules applied to batches, and what they did."""

    def __init__(
        self, cfg: Config, sets: list[rules.RuleSet], words: badwords.BadWords | None = None
    ) -> None:
        self.cfg, self.sets, self.words = cfg, sets, words
        self.rules = [rule for one in sets for rule in one.rules]
        self.needed = rules.needed(self.rules)
        self.seen = self.bytes_in = 0
        self.removed: Counter[str] = Counter()
        self.samples: dict[str, list[str]] = {}
        self.edited: dict[str, Counter[str]] = {}
        self._broken: Counter[str] = Counter()
        self._alone: Counter[str] = Counter()

    def __call__(
        self, documents: list[Document], table: dict[str, np.ndarray]
    ) -> Iterator[tuple[Document, Rejection | None]]:
        verdicts = rules.judge(self.rules, table, self.cfg.seed)
        self._broken.update(verdicts.broken)
        self._alone.update(verdicts.alone)
        for document, verdict, lang in zip(documents, verdicts.first, table["lang"], strict=True):
            self.seen += 1
            self.bytes_in += len(document.text.encode("utf-8", "replace"))
            if verdict is None and self.cfg.edit_lines:
                document, verdict = self._edited(document, lang)
            # C4 asks this of the lines that stay.
            if verdict is None and self.words and (word := self.words.find(document.text, lang)):
                verdict = Rejection("bad_words", f"says `{word}`, which is on the list")
            if verdict is not None:
                self._note(document, verdict)
            yield document, verdict

    def _edited(self, document: Document, lang: str) -> tuple[Document, Rejection | None]:
        text = document.text
        for one in self.sets:
            if not one.lines or lang in one.skip_languages:
                continue
            left = lines.edit(text, one.lines)
            if left != text:
                tally = self.edited.setdefault(one.name, Counter())
                tally.update(
                    documents=1, chars=len(text) - len(left), lines=text.count("\n") - left.count("\n")
                )
            text = left
            if not text:
                return document, Rejection(f"{one.name}_no_lines", "its line filter leaves nothing")
        return (document if text == document.text else replace(document, text=text)), None

    def _note(self, document: Document, verdict: Rejection) -> None:
        self.removed[verdict.rule] += 1
        samples = self.samples.setdefault(verdict.rule, [])
        if len(samples) < 3:
            samples.append(f"{verdict.reason}: {document.text[:120]}")

    def facts(self) -> dict[str, Any]:
        """Per rule: its limit, how many documents break it, how many it removed, how many break it alone."""
        return {
            rule.name: {
                "signal": rule.signal,
                "limit": rule.limit,
                **{k: v for k in ("languages", "skip_languages") if (v := list(getattr(rule, k)))},
                "broken": self._broken[rule.name],
                "removed": self.removed[rule.name],
                "alone": self._alone[rule.name],
            }
            for rule in self.rules
        }
