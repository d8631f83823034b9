"""OpenAI messages: {messages: [{role: system|user|assistant|tool, content, tool_calls, …}]}, with optional
tools.

`function_call` and the role `function` (the older spelling) are read as well, as is `tools` or `functions`
beside `messages`. An answer of `weight` 0 is not to be trained on. Our own conversations are of this format.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import id_of, reader, source_of
from caravan.data.formats._turns import messages_of, trained, with_system
from caravan.types import Conversation

KINDS = ("conversations",)


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if not isinstance(sample, dict) or isinstance(sample.get("label"), bool) or "chosen" in sample:
        return None
    return "records hold a list 'messages'" if isinstance(sample.get("messages"), list) else None


def convert(row: dict[str, Any], kind: str) -> Iterator[Conversation]:
    messages = trained(messages_of(row.get("messages")))
    yield Conversation(with_system(row, messages), id_of(row), source_of(row))


read = reader(convert)
