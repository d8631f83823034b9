"""A folder of raw text to token shards in one command, with a page that shows what each rule removed.

    raw -> corpus -> signals -> filter -> dedup -> decontaminate -> pii -> tokenizer -> shards

Every step is a stage that can be run alone; the same command twice answers from the store, and a changed rule
repeats only what follows it.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import orjson

from caravan import stage
from caravan.recipes.flow import Caravan
from caravan.store import Artefact, Store
from caravan.types import UserError

TEXT_KEYS = ("text", "content", "raw_content")
CONTAMINATED = ("cut", "mask", "drop", "report")
READABLE = (".json", ".jsonl", ".csv", ".tsv")
WHOLE_BYTES = 256 << 20
"""A .json file larger than this is left as it is: an array must be read at once."""
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is read, by which rules it is cleaned, and where the page goes."""

    raw: Path
    """Your texts: a file or a folder of any known formats."""
    benchmarks: Path | None = None
    """Questions that must not be in the text: a file or folder."""
    contaminated: str = "cut"
    """What happens where the text repeats one: cut it out with its surroundings, mask, drop the document, or
    report."""
    skip: tuple[str, ...] = ()
    """Files and folders of `raw` to leave out, by their path in it."""
    records: bool = True
    """Make documents of JSON and CSV records of other shapes too (questions, chats): all their texts, one
    below the other."""
    rules: tuple[str, ...] = ("gopher", "chinese")
    """Rule sets, in their order; empty filters nothing."""
    near: float = 0.75
    """Jaccard similarity from which on near duplicates go; 0 keeps them."""
    substring: int = 50
    """Cut spans of this many tokens that stand elsewhere too; 0 keeps them."""
    pii: str = "replace"
    """What happens to personal data: replace, drop the document, or keep."""
    vocab: int = 8192
    """Entries of the tokenizer."""
    tokenizer_bytes: int = 16 << 20
    """Text the tokenizer learns from, a sample by hashes (bytes)."""
    page: Path = Path("corpus.html")
    """Where the page is written."""


@dataclass(frozen=True)
class Road:
    """What was made."""

    corpora: tuple[Artefact, ...]
    """One per step, the finished one last."""
    tokenizer: Artefact
    shards: Artefact


def main(cfg: Config, store: Store, rt: stage.Runtime) -> int:
    """Clean, tokenize and shard; prints the shards and where the page is."""
    for path in (cfg.raw, cfg.benchmarks):
        if path is not None and not path.expanduser().exists():
            raise UserError(f"there is no file or folder {path}", "the path is taken from the current folder")
    for value, known in ((cfg.pii, ("replace", "drop", "keep")), (cfg.contaminated, CONTAMINATED)):
        if value not in known:
            raise UserError(f"`{value}` is no way to treat what is found", f"one of {', '.join(known)}")
    road = walk(Caravan(store, rt), cfg)
    print(f"page: {write_page(store, road, cfg.page.expanduser())}", file=sys.stderr)
    print(road.shards.ref)
    return 0


def walk(c: Caravan, cfg: Config) -> Road:
    """All steps; the call graph is the flow. Near duplicates are left to `dedup`, which names who stays."""
    with tempfile.TemporaryDirectory(dir=_made(c.store.root)) as folder:
        raw = c.add(gathered(cfg, Path(folder)))
    made = [c.corpus(raw=raw, near_duplicates=0.0)]
    if cfg.rules:
        signals = c.signals(corpus=made[-1])
        made.append(c.filter(corpus=made[-1], signals=signals, rules=cfg.rules))
    made.append(c.dedup(corpus=made[-1], near=cfg.near, substring=cfg.substring))
    if cfg.benchmarks is not None:
        questions = c.add(cfg.benchmarks.expanduser())
        made.append(c.decontaminate(corpus=made[-1], benchmarks=questions, action=cfg.contaminated))
    if cfg.pii != "keep":
        made.append(c.pii(corpus=made[-1], action=cfg.pii))
    tokenizer = c.tokenizer(corpus=made[-1], vocab=cfg.vocab, sample_bytes=cfg.tokenizer_bytes)
    return Road(tuple(made), tokenizer, c.shards(corpus=made[-1], tokenizer=tokenizer))


def write_page(store: Store, road: Road, path: Path) -> Path:
    """The page of the finished corpus, with what was made of it."""
    from caravan.report import corpus

    return corpus.build(store, road.corpora[-1], path, (road.tokenizer, road.shards))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def gathered(cfg: Config, folder: Path) -> Path:
    """What is read: `raw` itself, or a copy of it in `folder` without what is skipped and with other records
    made into documents. Files that stay as they are become links to the same bytes where the disk allows
    it."""
    raw = cfg.raw.expanduser().resolve()
    if raw.is_file() or not (cfg.skip or cfg.records):
        return raw
    whole = folder / raw.name
    skipped = [PurePosixPath(name) for name in cfg.skip]
    unseen = set(skipped)
    for path in sorted(p for p in raw.rglob("*") if p.is_file() and not p.is_symlink()):
        name = PurePosixPath(path.relative_to(raw).as_posix())
        if found := [s for s in skipped if s == name or s in name.parents]:
            unseen -= set(found)
            continue
        if any(part.startswith(".") for part in name.parts):
            continue
        target = _made((whole / name).parent) / name.name
        if not (cfg.records and _convert(path, str(name), target)):
            _link(path, target)
    if unseen:
        raise UserError(f"there is no {min(map(str, unseen))} in {raw}", "--skip takes paths from its top")
    if not whole.exists():
        raise UserError(f"there are no files in {raw}", "give a file or a folder with data in it")
    return whole


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # another disk
        shutil.copyfile(path, target)


def _convert(path: Path, name: str, target: Path) -> bool:
    """Write a file of documents made from records of another shape; False if its records are documents
    already, or it cannot be read as records."""
    if path.suffix.lower() not in READABLE or path.stem == "MANIFEST":
        return False
    try:
        rows = _records(path)
        first = next(rows, None)
    except (ValueError, csv.Error):
        return False
    if first is None or _names_text(first):
        return False
    draft = target.with_name(f"{target.stem}.{target.suffix[1:]}.jsonl")
    number = 0
    try:
        with draft.open("wb") as file:
            for lang, text in _texts(_again(first, rows)):
                row = {"id": f"{name}/{number}", "text": text, "source": name, "lang": lang}
                file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
                number += 1
    except (ValueError, csv.Error):
        number = 0
    if not number:
        draft.unlink()
    return bool(number)


def _names_text(first: Any) -> bool:
    """Whether a record (or the header of a table) says itself where its text is."""
    if isinstance(first, dict):
        return any(isinstance(first.get(key), str) for key in TEXT_KEYS)
    return isinstance(first, list) and any(str(cell).lower() in TEXT_KEYS for cell in first)


def _again(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _records(path: Path) -> Iterator[Any]:
    """Records of a file. ValueError if it holds something else."""
    if path.suffix.lower() == ".json":
        if path.stat().st_size > WHOLE_BYTES:
            raise ValueError("too large to read at once")
        whole = orjson.loads(path.read_bytes())
        if not isinstance(whole, list):
            raise ValueError("no array of records")
        yield from whole
    elif path.suffix.lower() == ".jsonl":
        with path.open("rb") as file:
            yield from (orjson.loads(line) for line in file if line.strip())
    else:
        with io.TextIOWrapper(path.open("rb"), "utf-8-sig", newline="") as file:
            yield from csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")


def _texts(rows: Iterator[Any]) -> Iterator[tuple[str, str]]:
    """(language or "", text). Records that name a `doc` and hold one text per language are its segments:
    together they are one text per language."""
    doc, parts = None, dict[str, list[str]]()
    for row in rows:
        spoken = _by_language(row)
        if not spoken or row["doc"] != doc:
            yield from ((lang, "\n\n".join(some)) for lang, some in parts.items())
            parts = {}
        if not spoken:
            if text := "\n".join(_leaves(row)):
                yield "", text
            doc = None
            continue
        doc = row["doc"]
        for lang, text in spoken.items():
            parts.setdefault(lang, []).append(text)
    yield from ((lang, "\n\n".join(some)) for lang, some in parts.items())


def _by_language(row: Any) -> dict[str, str]:
    if not isinstance(row, dict) or not isinstance(row.get("doc"), str):
        return {}
    rest = {k: v for k, v in row.items() if isinstance(v, str) and k != "doc"}
    return {k: v for k, v in rest.items() if v} if rest and all(map(_LANGUAGE.fullmatch, rest)) else {}


def _leaves(value: Any) -> Iterator[str]:
    """All texts in a record, in its order; names of fields and bare words (roles, labels, ids) are not
    text."""
    if isinstance(value, str):
        if len(value.split()) > 1 or len(value) > 40 or not value.isascii():
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _leaves(inner)
