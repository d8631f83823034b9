"""Dolly: {instruction, context, response, category}; the context stands behind the instruction, an empty line
between."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import id_of, reader, source_of, text_of
from caravan.types import Conversation, Message

KINDS = ("conversations",)


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if isinstance(sample, dict) and all(
        isinstance(sample.get(k), str) for k in ("instruction", "context", "response")
    ):
        return "records hold 'instruction', 'context' and 'response'"
    return None


def convert(row: dict[str, Any], kind: str) -> Iterator[Conversation]:
    question, context = text_of(row, "instruction"), text_of(row, "context", "")
    question = f"{question}\n\n{context}" if context.strip() else question
    turns = (Message("user", question), Message("assistant", text_of(row, "response")))
    yield Conversation(turns, id_of(row), source_of(row))


read = reader(convert)
