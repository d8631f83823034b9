"""Word documents: .docx, one file is one document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.extract import workers
from caravan.data.formats import _jobs
from caravan.data.formats._files import Limits, OnBad, suffix_of

KINDS = ("corpus",)


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if isinstance(sample, bytes) and suffix_of(path) == ".docx":
        return "the name ends in .docx"
    return None


def jobs(path: Path, on_bad: OnBad, limits: Limits) -> Iterator[workers.Job]:
    yield _jobs.whole_file(path, "docx", "a Word document", limits)


read = _jobs.reader(jobs)
