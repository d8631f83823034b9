"""Prompt and completion: {prompt, completion}, both text; an end-of-text mark behind the completion is
dropped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import id_of, reader, source_of, text_of
from caravan.data.formats._turns import with_system
from caravan.types import Conversation, Message

KINDS = ("conversations",)
KEYS = ("completion", "response", "answer")


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if isinstance(sample, dict) and isinstance(sample.get("prompt"), str) and "chosen" not in sample:
        key = next((k for k in KEYS if isinstance(sample.get(k), str)), None)
        if not isinstance(sample.get("label"), bool):  # KTO's
            return key and f"records hold 'prompt' and {key!r}"
    return None


def convert(row: dict[str, Any], kind: str) -> Iterator[Conversation]:
    key = next((k for k in KEYS if k in row), KEYS[0])
    answer = text_of(row, key).rstrip().removesuffix("<|endoftext|>").strip()
    turns = (Message("user", text_of(row, "prompt")), Message("assistant", answer))
    yield Conversation(with_system(row, turns), id_of(row), source_of(row))


read = reader(convert)
