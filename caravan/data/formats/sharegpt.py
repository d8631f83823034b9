"""ShareGPT: {conversations: [{from: human|gpt|system|function_call|observation, value}]}, with optional
system, tools.

Tools become part of the system turn, one JSON object a line; a function call becomes an assistant turn
between <tool_call> tags (the convention of the Qwen and Hermes templates), an observation a tool turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from caravan.data.formats._files import Bad, id_of, messages_of, reader, source_of, with_system
from caravan.types import Conversation, Message

KINDS = ("conversations",)


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if not isinstance(sample, dict) or "chosen" in sample:
        return None
    turns = sample.get("conversations", sample.get("conversation"))
    if isinstance(turns, list) and all(isinstance(t, dict) for t in turns):
        return "records hold a list 'conversations'"
    return None


def convert(row: dict[str, Any], kind: str) -> Iterator[Conversation]:
    messages = with_system(row, messages_of(row.get("conversations", row.get("conversation"))))
    if tools := _tools(row.get("tools")):
        text = "# Tools\n" + "\n".join(orjson.dumps(t).decode() for t in tools)
        if messages[0].role == "system":
            messages = (Message("system", f"{messages[0].content}\n\n{text}"), *messages[1:])
        else:
            messages = (Message("system", text), *messages)
    yield Conversation(messages, id_of(row), source_of(row))


def _tools(given: Any) -> list[Any]:
    if isinstance(given, str) and given.strip():
        try:
            given = orjson.loads(given)
        except orjson.JSONDecodeError as error:
            raise Bad(f"JSON under 'tools' ({error})") from error
    return given if isinstance(given, list) else []


read = reader(convert)
