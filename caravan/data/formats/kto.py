"""KTO: {prompt, completion, label: true|false}, or {messages, label}: single answers called good or bad.

As preferences, every answer with its label; as conversations, those labelled true. Our own
labelled answers ({prompt, response, good}) are of this format.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, reader, source_of
from caravan.data.formats._turns import answer_text, messages_of, with_system
from caravan.data.formats.pairs import answer_of, prompt_of
from caravan.types import Conversation, Labelled, Message

KINDS = ("conversations", "preferences")
ANSWERS = ("completion", "response", "answer")
_WHOLE = ("messages", "conversations")


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if not isinstance(sample, dict):
        return None
    if (
        isinstance(sample.get("good"), bool)
        and isinstance(sample.get("prompt"), list)
        and "response" in sample
    ):
        return "records hold 'prompt', 'response' and a true or false 'good'"
    if not isinstance(sample.get("label"), bool):
        return None
    whole = next((k for k in _WHOLE if isinstance(sample.get(k), list)), None)
    if whole:
        return f"records hold {whole!r} and a true or false 'label'"
    key = next((k for k in ANSWERS if k in sample), None)
    if "prompt" in sample and key:
        return f"records hold 'prompt', {key!r} and a true or false 'label'"
    return None


def convert(row: dict[str, Any], kind: str) -> Iterator[Conversation | Labelled]:
    label = row.get("label", row.get("good"))
    if not isinstance(label, bool):
        raise Bad("true or false under 'label'")
    key = next((k for k in ANSWERS if k in row), None)
    if "prompt" in row and key:
        prompt, answer = answer_of(row[key], row, prompt_of(row), key)
        last = Message("assistant", answer)
    else:
        whole = next((row[k] for k in _WHOLE if isinstance(row.get(k), list)), None)
        *before, last = with_system(row, messages_of(whole))
        prompt = tuple(before)
        if kind == "preferences" and last.role != "assistant":
            raise Bad("'messages' that end with an answer of the assistant")
    if kind == "preferences":
        yield Labelled(prompt, answer_text([last]), label, id_of(row), source_of(row))
    elif label:
        yield Conversation((*prompt, last), id_of(row), source_of(row))


read = reader(convert)
