"""Plain text: .txt .md .rst, source code, or anything else that is text; one file is one document or several.

A file longer than the limit is cut at empty lines (at any line, where there are none). UTF-8 needs no mark;
other encodings are taken from a byte order mark or told from the first 64 KB. Markdown loses front matter and
comments.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.extract import encoding, markdown
from caravan.data.formats import docx, epub, html, pdf, warc
from caravan.data.formats._files import (
    RECORDS,
    Found,
    Limits,
    OnBad,
    Problem,
    called,
    chunks,
    lines,
    suffix_of,
)
from caravan.data.formats._jobs import GARBLED
from caravan.types import Document

KINDS = ("corpus",)
CODE = frozenset((
    ".py", ".pyi", ".pyx", ".js", ".jsx", ".mjs", ".ts", ".tsx", ".vue", ".c", ".h", ".cc", ".cpp", ".cxx",
    ".hpp", ".hh", ".cu", ".m", ".mm", ".java", ".kt", ".kts", ".scala", ".groovy", ".cs", ".fs", ".vb",
    ".go", ".rs", ".swift", ".dart", ".zig", ".nim", ".rb", ".php", ".pl", ".pm", ".lua", ".r", ".jl",
    ".hs", ".ml", ".mli", ".ex", ".exs", ".erl", ".clj", ".lisp", ".scm", ".el", ".sh", ".bash", ".zsh",
    ".fish", ".ps1", ".bat", ".sql", ".proto", ".css", ".scss", ".cmake", ".mk", ".asm", ".s", ".v", ".vhd",
    ".f90", ".toml", ".yaml", ".yml", ".ini", ".cfg",
))  # fmt: skip
MARKDOWN = (".md", ".markdown", ".mdx")
PROSE = (".txt", ".text", ".rst", ".tex", ".log", ".adoc", ".org", *MARKDOWN)
_OTHERS = (html, warc, pdf, epub, docx)
_CONTROL = frozenset(range(32)) - frozenset(b"\t\n\r\f\x1b\b")


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    suffix = suffix_of(path)
    if not isinstance(sample, bytes) or suffix in RECORDS or any(f.detect(sample, path) for f in _OTHERS):
        return None
    if suffix in PROSE or suffix in CODE:
        return f"the name ends in {suffix}"
    name, reason = encoding.guess(sample)
    if not sample or name is None or (not reason.startswith("a byte") and _is_binary(sample)):
        return None
    return "UTF-8 text" if name.startswith("utf-8") else f"text in {name} ({reason})"


def _is_binary(sample: bytes) -> bool:
    return sum(b in _CONTROL for b in sample) > 0.01 * len(sample)


def read(path: Path, kind: str, on_bad: OnBad, limits: Limits) -> Iterator[Found]:
    suffix = suffix_of(path)
    lang = "code" if suffix in CODE else ""
    texts = _decoded(path, on_bad, limits)
    held: list[str] = []
    size = part = 0
    for text in markdown.lines(texts) if suffix in MARKDOWN else texts:
        full = size >= limits.document_chars and not text.strip()
        if full or size >= 2 * limits.document_chars:
            yield from _document(path, part, held, lang, on_bad)
            held, size, part = [], 0, part + 1
        held.append(text)
        size += len(text)
    if any(text.strip() for text in held):
        yield from _document(path, part, held, lang, on_bad, last=True)
    elif held and not part:
        on_bad(Problem(path, "", "a file with text in it", ""))


def _document(
    path: Path, part: int, held: list[str], lang: str, on_bad: OnBad, last: bool = False
) -> Iterator[Found]:
    text = "".join(held)
    if not text.isascii() and lang != "code" and encoding.mojibake(text) > GARBLED:
        place = f"part {part + 1}" if part else ""
        expected = "text that was decoded in its own encoding (this shows Ã© for é)"
        on_bad(Problem(path, place, expected, text[:200]))
        return
    name = called(Path(path.name))
    yield Found(Document(name if last and not part else f"{name}#{part}", text, "", lang))


def _decoded(path: Path, on_bad: OnBad, limits: Limits) -> Iterator[str]:
    name, _ = encoding.guess(next(chunks(path, _ignore, limits), b"")[: encoding.SAMPLE])
    # Byte order marks of UTF-16 and UTF-32 are already turned into UTF-8 by `lines`.
    codec = "utf-8" if name is None or name.startswith("utf") else name
    for number, line in lines(path, on_bad, limits):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        try:
            text = line.decode(codec)
        except UnicodeDecodeError as error:
            shown = line[:200].decode(codec, "replace")
            label = "UTF-8" if codec == "utf-8" else codec
            on_bad(Problem(path, f"line {number}", f"{label} text (byte {error.start} is not)", shown))
            continue
        yield text


def _ignore(problem: Problem) -> None:
    """Reading the file will meet it again."""
