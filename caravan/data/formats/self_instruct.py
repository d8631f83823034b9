"""Self-Instruct tasks: {instruction, instances: [{input, output}]}; each instance is a conversation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, reader, source_of, text_of
from caravan.data.formats.alpaca import asked
from caravan.types import Conversation, Message

KINDS = ("conversations",)


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if isinstance(sample, dict) and "instruction" in sample and isinstance(sample.get("instances"), list):
        return "records hold 'instruction' and a list 'instances'"
    return None


def convert(row: dict[str, Any], kind: str) -> Iterator[Conversation]:
    instruction, instances = text_of(row, "instruction"), row.get("instances")
    if not isinstance(instances, list) or not instances:
        raise Bad("a list of {input, output} under 'instances' that is not empty")
    for at, instance in enumerate(instances):
        if not isinstance(instance, dict):
            raise Bad("instances that are objects with an input and an output")
        question = asked(instruction, text_of(instance, "input", ""))
        turns = (Message("user", question), Message("assistant", text_of(instance, "output")))
        name = id_of(row)
        yield Conversation(turns, f"{name}#{at}" if name and at else name, source_of(row))


read = reader(convert)
