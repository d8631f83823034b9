"""Alpaca: {instruction, input, output}, with optional system and history; BELLE's, COIG's and GPTeacher's
files too.

`history` is a list of earlier [question, answer] pairs, or empty text. `<noinput>` stands for an empty input.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, reader, source_of, text_of
from caravan.data.formats._turns import with_system
from caravan.data.formats.belle import transcript
from caravan.types import Conversation, Message

KINDS = ("conversations",)
ANSWERS = ("output", "response")


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if not isinstance(sample, dict) or "instruction" not in sample or transcript(sample["instruction"]):
        return None
    if isinstance(sample.get("context"), str):  # Dolly's
        return None
    key = next((k for k in ANSWERS if k in sample), None)
    return key and f"records hold 'instruction' and {key!r}"


def convert(row: dict[str, Any], kind: str) -> Iterator[Conversation]:
    question = asked(text_of(row, "instruction"), text_of(row, "input", ""))
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


def asked(instruction: str, extra: str) -> str:
    """An instruction and what it is about."""
    if not extra.strip() or extra.strip() == "<noinput>":
        return instruction
    return f"{instruction}\n{extra}" if instruction.strip() else extra


read = reader(convert)
