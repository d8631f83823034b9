"""Alpaca: {instruction, input, output}, with optional system and history.

`history` is a list of earlier [question, answer] pairs, or empty text. `<noinput>` stands for an empty input.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, reader, source_of, text_of, with_system
from caravan.types import Conversation, Message

KINDS = ("conversations",)


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if isinstance(sample, dict) and "instruction" in sample and ("output" in sample or "response" in sample):
        return "records hold 'instruction' and 'output'"
    return None


def convert(row: dict[str, Any], kind: str) -> Iterator[Conversation]:
    question, extra = text_of(row, "instruction"), text_of(row, "input", "")
    if extra.strip() and extra.strip() != "<noinput>":
        question = f"{question}\n{extra}" if question.strip() else extra
    turns: list[Message] = []
    history = row.get("history")
    if history and not isinstance(history, list | str):
        raise Bad("a 'history' that is a list of [question, answer]")
    for pair in history if isinstance(history, list) else []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)):
            raise Bad("a 'history' that is a list of [question, answer]")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    answer = text_of(row, "output" if "output" in row else "response")
    turns += [Message("user", question), Message("assistant", answer)]
    yield Conversation(with_system(row, tuple(turns)), id_of(row), source_of(row))


read = reader(convert)
