"""BELLE multiturn: {instruction: "Human:…\\nAssistant:…\\nHuman:…\\nAssistant:", output}, the talk so far in
one text.

BELLE's other files are Alpaca's and ShareGPT's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, reader, source_of, text_of
from caravan.types import Conversation, Message

KINDS = ("conversations",)
_TURN = re.compile(r"(?:^|\n)\s*(Human|Assistant)\s*[:：]")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def transcript(text: Any) -> bool:
    """Whether a text begins with a human's turn and ends where the assistant's is due."""
    if not isinstance(text, str):
        return False
    marks = list(_TURN.finditer(text))
    return len(marks) > 1 and marks[0].group(1) == "Human" and not text[: marks[0].start()].strip() and (
        marks[-1].group(1) == "Assistant" and not text[marks[-1].end() :].strip()
    )  # fmt: skip


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if isinstance(sample, dict) and transcript(sample.get("instruction")) and "output" in sample:
        return "'instruction' is a talk of Human and Assistant that 'output' goes on with"
    return None


def convert(row: dict[str, Any], kind: str) -> Iterator[Conversation]:
    text = text_of(row, "instruction")
    if not transcript(text):
        raise Bad("a talk that begins with 'Human:' and ends with 'Assistant:' under 'instruction'")
    marks = list(_TURN.finditer(text))
    turns = [
        Message(_ROLE[mark.group(1)], text[mark.end() : after.start()].strip())
        for mark, after in pairwise(marks)
    ]
    turns.append(Message("assistant", text_of(row, "output")))
    yield Conversation(tuple(turns), id_of(row), source_of(row))


read = reader(convert)
