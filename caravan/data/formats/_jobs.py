"""Formats that are extracted in a process of their own: how a job becomes a document or a problem."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caravan.data.extract import workers
from caravan.data.extract.encoding import mojibake
from caravan.data.formats._files import Found, Limits, OnBad, Problem, called
from caravan.types import Document

Jobs = Callable[[Path, OnBad, Limits], Iterator[workers.Job]]
GARBLED = 0.01
"""Share of characters above which a text counts as decoded in the wrong encoding."""


@dataclass(frozen=True, slots=True)
class Note:
    """Where a job comes from and what its document will be called."""

    path: Path
    place: str
    id: str
    what: str
    """`a page`, `a PDF`: for complaints."""


def settle(job: workers.Job, answer: dict[str, Any], on_bad: OnBad) -> Iterator[Found]:
    """The document an answer holds, or a problem."""
    note: Note = job.note
    text = answer.get("text", "")
    if "expected" in answer:
        on_bad(Problem(note.path, note.place, answer["expected"], note.id))
    elif not text.strip():
        on_bad(Problem(note.path, note.place, f"{note.what} with text in it", note.id))
    elif mojibake(text) > GARBLED:
        expected = f"{note.what} that was decoded in its own encoding (this one shows Ã© for é)"
        on_bad(Problem(note.path, note.place, expected, text[:200]))
    else:
        yield Found(Document(note.id, text), "", note.place)


def reader(jobs: Jobs) -> Callable[[Path, str, OnBad, Limits], Iterator[Found]]:
    """`read` of a format that has `jobs`, one after another."""

    def read(path: Path, kind: str, on_bad: OnBad, limits: Limits) -> Iterator[Found]:
        for job in jobs(path, on_bad, limits):
            yield from settle(job, workers.one(job), on_bad)

    return read


def whole_file(path: Path, format_: str, what: str, limits: Limits) -> workers.Job:
    """The job to extract a file as a whole; the worker opens it."""
    head = {
        "work": "file",
        "format": format_,
        "path": os.fsencode(path.absolute()).hex(),  # a name need not be UTF-8
        "limit": limits.unpacked_bytes,
    }
    return workers.Job(head, note=Note(path, "", called(Path(path.name)), what))
