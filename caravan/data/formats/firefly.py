"""Firefly: {kind, input, target}; the kind of task becomes the source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import id_of, reader, source_of, text_of
from caravan.types import Conversation, Message

KINDS = ("conversations",)


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if isinstance(sample, dict) and all(isinstance(sample.get(k), str) for k in ("input", "target")):
        return "records hold 'input' and 'target'"
    return None


def convert(row: dict[str, Any], kind: str) -> Iterator[Conversation]:
    turns = (Message("user", text_of(row, "input")), Message("assistant", text_of(row, "target")))
    yield Conversation(turns, id_of(row), source_of(row) or text_of(row, "kind", ""))


read = reader(convert)
