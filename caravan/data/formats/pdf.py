"""PDF files with a text layer: .pdf, one file is one document."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.extract import html, workers
from caravan.data.formats import _jobs
from caravan.data.formats._files import Limits, OnBad, Problem, suffix_of

KINDS = ("corpus",)


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if isinstance(sample, bytes) and sample.startswith(b"%PDF-"):
        return "it begins with %PDF"
    return "the name ends in .pdf" if isinstance(sample, bytes) and suffix_of(path) == ".pdf" else None


def jobs(path: Path, on_bad: OnBad, limits: Limits) -> Iterator[workers.Job]:
    if importlib.util.find_spec("pypdf") is None:
        on_bad(Problem(path, "", f"the reader of PDF files to be installed ({html.INSTALL})", ""))
        return
    yield _jobs.whole_file(path, "pdf", "a PDF", limits)


read = _jobs.reader(jobs)
