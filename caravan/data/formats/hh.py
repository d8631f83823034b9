"""HH-RLHF: {chosen, rejected}, whole transcripts of "\\n\\nHuman: …\\n\\nAssistant: …" that differ in the
last answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, reader, source_of, text_of
from caravan.data.formats._turns import is_transcript, transcript_of
from caravan.data.formats.pairs import PROMPTS
from caravan.types import Ranking

KINDS = ("preferences",)


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if isinstance(sample, dict) and not sample.keys() & set(PROMPTS):
        chosen, rejected = sample.get("chosen"), sample.get("rejected")
        if isinstance(chosen, str) and isinstance(rejected, str) and is_transcript(chosen):
            return "'chosen' and 'rejected' are transcripts of Human and Assistant"
    return None


def convert(row: dict[str, Any], kind: str) -> Iterator[Ranking]:
    chosen, rejected = (transcript_of(text_of(row, k)) for k in ("chosen", "rejected"))
    if chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        raise Bad("transcripts that end with an answer of the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise Bad("two transcripts that are the same up to the last answer")
    yield Ranking(chosen[:-1], (chosen[-1].content, rejected[-1].content), (0, 1), id_of(row), source_of(row))


read = reader(convert)
