"""KTO: {messages, label: true|false}; the answers labelled true are conversations, the others are left
out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, messages_of, reader, source_of
from caravan.types import Conversation

KINDS = ("conversations",)


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if (
        isinstance(sample, dict)
        and isinstance(sample.get("messages"), list)
        and isinstance(sample.get("label"), bool)
    ):
        return "records hold 'messages' and a true or false 'label'"
    return None


def convert(row: dict[str, Any], kind: str) -> Iterator[Conversation]:
    if not isinstance(row.get("label"), bool):
        raise Bad("true or false under 'label'")
    messages = messages_of(row.get("messages"))
    if row["label"]:
        yield Conversation(messages, id_of(row), source_of(row))


read = reader(convert)
