"""Plain text: .txt .md .rst, source code, or anything else that is UTF-8 text; one file is one document or
several.

A file longer than the limit is cut at empty lines (at any line, where there are none).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import RECORDS, Found, Limits, OnBad, Problem, lines, suffix_of
from caravan.types import Document

KINDS = ("corpus",)
CODE = (
    ".py",
    ".pyi",
    ".js",
    ".ts",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".java",
    ".go",
    ".rs",
    ".rb",
    ".sh",
    ".sql",
)
PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".log")
_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    suffix = suffix_of(path)
    if not isinstance(sample, bytes) or suffix in RECORDS:
        return None
    if suffix in PROSE or suffix in CODE:
        return f"the name ends in {suffix}"
    if not sample or b"\0" in sample:
        return None
    try:
        sample[: len(sample) - 4 if len(sample) > 64 else len(sample)].decode("utf-8")
    except UnicodeDecodeError as error:
        return "UTF-8 text" if error.start >= len(sample) - 8 else None
    return "UTF-8 text"


def read(path: Path, kind: str, on_bad: OnBad, limits: Limits) -> Iterator[Found]:
    lang = "code" if suffix_of(path) in CODE else ""
    held: list[str] = []
    size = part = 0
    for text in _decoded(path, on_bad, limits):
        full = size >= limits.document_chars and not text.strip()
        if full or size >= 2 * limits.document_chars:
            yield Found(Document(f"{path.name}#{part}", "".join(held), "", lang))
            held, size, part = [], 0, part + 1
        held.append(text)
        size += len(text)
    rest = "".join(held)
    if rest.strip():
        yield Found(Document(f"{path.name}#{part}" if part else path.name, rest, "", lang))


def _decoded(path: Path, on_bad: OnBad, limits: Limits) -> Iterator[str]:
    for number, line in lines(path, on_bad, limits):
        if number == 1 and line[:2] in _BOMS:
            on_bad(Problem(path, "", f"UTF-8, not {_BOMS[line[:2]]}: convert it with iconv", ""))
            return
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            shown = line[:200].decode("utf-8", "replace")
            on_bad(Problem(path, f"line {number}", f"UTF-8 text (byte {error.start} is not)", shown))
