"""ShareGPT: {conversations: [{from: human|gpt|system|function_call|observation, value}]}, with optional
system, tools.

A function call belongs to the assistant's turn, an observation is a tool turn. {human, assistant} pairs under
`conversation` are read too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, reader, source_of, text_of
from caravan.data.formats._turns import messages_of, trained, with_system
from caravan.types import Conversation, Message

KINDS = ("conversations",)
KEYS = ("conversations", "conversation", "items", "dialogue", "dialog")
_PAIR = {"human", "assistant"}


def _turns(row: dict[str, Any]) -> tuple[str, list[Any]] | None:
    key = next((k for k in KEYS if isinstance(row.get(k), list)), None)
    return (key, row[key]) if key else None


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if not isinstance(sample, dict) or "chosen" in sample or isinstance(sample.get("label"), bool):
        return None
    found = _turns(sample)
    if found and all(isinstance(t, dict) for t in found[1]):
        return f"records hold a list {found[0]!r}"
    return None


def convert(row: dict[str, Any], kind: str) -> Iterator[Conversation]:
    found = _turns(row)
    if found is None or not found[1]:
        raise Bad("a list of turns under 'conversations' that is not empty")
    turns = found[1]
    if all(isinstance(t, dict) and t.keys() >= _PAIR for t in turns):
        messages: tuple[Message, ...] = tuple(
            Message(role, text_of(pair, key))
            for pair in turns
            for role, key in (("user", "human"), ("assistant", "assistant"))
        )
    else:
        messages = trained(messages_of(turns))
    yield Conversation(with_system(row, messages), id_of(row), source_of(row))


read = reader(convert)
