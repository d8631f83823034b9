"""Documents: one {text} per record (jsonl, json, parquet, arrow, csv), with optional id, source, lang.

A record that names no source but an address (`url`, `uri`) has that for its source, as a page of a web
archive has.
Where there is no `text`, a column of one of the other usual names is read, in any case of letters; else the
only column that holds text, if there is just one besides ids, addresses, dates and the like, and no list of
objects beside it: turns of a talk and ranked answers are no text of a document.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, reader, source_of
from caravan.types import Document

KINDS = ("corpus",)
KEYS = (
    "text",
    "content",
    "raw_content",
    "body",
    "page_content",
    "article",
    "document",
    "full_text",
    "plain_text",
)
_ABOUT = frozenset((
    "id", "_id", "uid", "uuid", "doc_id", "docid", "url", "uri", "link", "source", "src", "lang",
    "language", "date", "time", "timestamp", "created", "author", "title", "name", "file", "filename",
    "path", "license", "licence", "dataset", "domain", "split", "meta", "metadata", "hash", "digest",
    "category", "label", "tag", "type", "format", "version", "dump", "warc_id", "tools", "functions",
    "system", "system_prompt", "model",
))  # fmt: skip


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if not isinstance(sample, dict) or (key := key_of(sample)) is None:
        return None
    known = key.lower() in KEYS
    return f"records hold a text under {key!r}" if known else f"{key!r} is the only column that holds text"


def key_of(row: dict[str, Any]) -> str | None:
    """The field that holds a record's text."""
    for key in KEYS:
        if isinstance(row.get(key), str):
            return key
    texts = [k for k, v in row.items() if isinstance(v, str) and k.lower() not in _ABOUT]
    named = [k for k in texts if k.lower() in KEYS]
    if named:
        return min(named, key=lambda k: KEYS.index(k.lower()))
    alone = len(texts) == 1 and not any(map(_objects, row.values()))
    return texts[0] if alone and len(row[texts[0]].split()) > 1 else None


def _objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def address_of(row: dict[str, Any]) -> str:
    """The address a record came from, or empty: what tells web pages apart, as in a web archive."""
    given = (row.get(key) for key in ("url", "URL", "uri"))
    return next((a for a in given if isinstance(a, str) and a.startswith(("http://", "https://"))), "")


def convert(row: dict[str, Any], kind: str) -> Iterator[Document]:
    key = key_of(row)
    if key is None:
        raise Bad("a text under 'text'")
    lang = row.get("lang", row.get("language"))
    yield Document(
        id_of(row), row[key], source_of(row) or address_of(row), lang if isinstance(lang, str) else ""
    )


read = reader(convert)
