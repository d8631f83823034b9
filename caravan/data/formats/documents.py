"""Documents: one {text} per record (jsonl, json, parquet), with optional id, source, lang.

`content` and `raw_content` are read as `text` where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, reader, source_of
from caravan.types import Document

KINDS = ("corpus",)
KEYS = ("text", "content", "raw_content")


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if isinstance(sample, dict):
        for key in KEYS:
            if isinstance(sample.get(key), str):
                return f"records hold a text under {key!r}"
    return None


def convert(row: dict[str, Any], kind: str) -> Iterator[Document]:
    key = next((k for k in KEYS if isinstance(row.get(k), str)), None)
    if key is None:
        raise Bad("a text under 'text'")
    lang = row.get("lang", row.get("language"))
    yield Document(id_of(row), row[key], source_of(row), lang if isinstance(lang, str) else "")


read = reader(convert)
