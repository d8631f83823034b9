"""FLAN, T0 and P3: {inputs, targets}, or inputs_pretokenized and targets_pretokenized; an end-of-text mark is
dropped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, reader, source_of
from caravan.types import Conversation, Message

KINDS = ("conversations",)
KEYS = (
    ("inputs", "targets"),
    ("inputs_pretokenized", "targets_pretokenized"),
    ("source_text", "target_text"),
)
_ENDS = ("<|endoftext|>", "</s>")


def _keys(row: dict[str, Any]) -> tuple[str, str] | None:
    """The pair whose values are texts (P3 also holds `inputs` as token ids)."""
    return next((k for k in KEYS if all(isinstance(row.get(name), str) for name in k)), None)


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    keys = _keys(sample) if isinstance(sample, dict) else None
    return keys and f"records hold {keys[0]!r} and {keys[1]!r}"


def convert(row: dict[str, Any], kind: str) -> Iterator[Conversation]:
    keys = _keys(row)
    if keys is None:
        raise Bad("texts under 'inputs' and 'targets'")
    answer = row[keys[1]].strip()
    for end in _ENDS:
        answer = answer.removesuffix(end).rstrip()
    turns = (Message("user", row[keys[0]].strip()), Message("assistant", answer))
    source = row.get("task", row.get("task_name"))
    yield Conversation(turns, id_of(row), source_of(row) or (source if isinstance(source, str) else ""))


read = reader(convert)
