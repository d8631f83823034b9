"""Our corpora and steps in a datatrove pipeline (`pip install caravan-llm[datatrove]`), whose executors know
Slurm. A pipeline takes plain callables, so these are functions of (documents, rank, world size):

    LocalPipelineExecutor([
        trove.Corpus("artefact/"), trove.cleaned(), trove.ruled(("gopher",)), JsonlWriter("out/"),
    ]).run()

What datatrove writes as JSON lines, `caravan corpus` reads as it is, and `caravan shards --raw` its tokens
(`shardio/datatrove.py`). What needs all documents at once (duplicates) is not here: each rank of a pipeline
sees its own files only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from caravan.data import clean, lines, measure, records, rules, signals, steps
from caravan.data.clean import Rejection
from caravan.data.steps import Item
from caravan.types import Document, UserError


@dataclass(frozen=True)
class Corpus:
    """A reader: documents of a corpus artefact. Rank r of w takes numbers r, r + w, ..."""

    folder: str
    split: str = "train"

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        yield from data or ()  # as datatrove's readers do
        documents = records.read_documents(Path(self.folder) / f"{self.split}.jsonl.zst")
        for document in islice(documents, rank, None, world_size):
            about = {"source": document.source, "lang": document.lang}
            yield _theirs()(text=document.text, id=document.id, metadata=about)


@dataclass(frozen=True)
class Stepped:
    """A pipeline step of steps of ours (see `caravan.data.steps`). What they remove is not passed on."""

    steps: tuple[steps.Step, ...]

    def __call__(self, data: Iterable[Any], rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        chain = steps.Steps(self.steps)
        for batch in steps.batches(data, lambda d: len(d.text)):
            for theirs, (item, verdict) in zip(batch, chain([_ours(d) for d in batch]), strict=True):
                if verdict is None:
                    theirs.text = item.document.text
                    theirs.metadata["lang"] = item.document.lang
                    yield theirs


def cleaned() -> Stepped:
    """Texts tidied up as `caravan corpus` does it, and their languages."""
    return Stepped((_Clean(),))


def ruled(names: Sequence[str], edit_lines: bool = True) -> Stepped:
    """Rule sets as `caravan filter --rules` applies them, on signals computed on the way. UserError for a set
    that needs a classifier or a model."""
    for name in rules.needed([rule for one in rules.load(names) for rule in one.rules]):
        if not signals.families_of([name]):
            raise UserError(f"the rules need `{name}`", "apply them with `caravan filter`")
    return Stepped((_Judge(tuple(names), edit_lines),))


@dataclass(frozen=True)
class _Clean:
    name = "clean"

    def __call__(self, items: Sequence[Item]) -> list[Rejection | None]:
        for item in items:
            text = clean.normalise(item.document.text)
            lang = item.document.lang or clean.language(text)
            item.document = replace(item.document, text=text, lang=lang)
        return [None] * len(items)


@dataclass(frozen=True)
class _Judge:
    sets: tuple[str, ...]
    edit_lines: bool
    name = "rules"

    def __call__(self, items: Sequence[Item]) -> list[Rejection | None]:
        sets = rules.load(self.sets)
        every = [rule for one in sets for rule in one.rules]
        table = measure.Measure(signals.families_of(rules.needed(every)))([i.document for i in items])
        verdicts = rules.judge(every, table).first
        for d, item in enumerate(items):
            for one in sets if self.edit_lines and verdicts[d] is None else ():
                if one.lines and table["lang"][d] not in one.skip_languages:
                    item.document = replace(item.document, text=lines.edit(item.document.text, one.lines))
            if not item.document.text:
                verdicts[d] = verdicts[d] or Rejection("no_lines", "a line filter leaves nothing")
        return verdicts


def _ours(theirs: Any) -> Item:
    about = theirs.metadata
    return Item(Document(str(theirs.id), theirs.text, str(about.get("source", "")), about.get("lang", "")))


def _theirs() -> Any:
    try:
        from datatrove.data import Document as Theirs
    except ImportError as error:
        raise UserError("this needs datatrove", "pip install 'caravan-llm[datatrove]'") from error
    return Theirs
