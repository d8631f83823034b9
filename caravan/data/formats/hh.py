"""HH-RLHF: {chosen, rejected}, whole transcripts of "\\n\\nHuman: …\\n\\nAssistant: …" that differ in the
last answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, reader, source_of, text_of
from caravan.data.formats.pairs import PROMPTS
from caravan.types import Message, Ranking

KINDS = ("preferences",)
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if isinstance(sample, dict) and not sample.keys() & set(PROMPTS):
        chosen, rejected = sample.get("chosen"), sample.get("rejected")
        if isinstance(chosen, str) and isinstance(rejected, str) and _TURN.search("\n\n" + chosen.lstrip()):
            return "'chosen' and 'rejected' are transcripts of Human and Assistant"
    return None


def turns(transcript: str) -> tuple[Message, ...]:
    """A transcript's messages, in order; Bad if it does not begin with a speaker."""
    text = "\n\n" + transcript.lstrip()
    marks = list(_TURN.finditer(text))
    if not marks or marks[0].start() != 0:
        raise Bad("a transcript that begins with 'Human:'")
    ends = [m.start() for m in marks[1:]] + [len(text)]
    return tuple(
        Message(_ROLE[m.group(1)], text[m.end() : end].strip()) for m, end in zip(marks, ends, strict=True)
    )


def convert(row: dict[str, Any], kind: str) -> Iterator[Ranking]:
    chosen, rejected = turns(text_of(row, "chosen")), turns(text_of(row, "rejected"))
    if chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        raise Bad("transcripts that end with an answer of the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise Bad("two transcripts that are the same up to the last answer")
    yield Ranking(chosen[:-1], (chosen[-1].content, rejected[-1].content), (0, 1), id_of(row), source_of(row))


read = reader(convert)
