"""SHP: {history, human_ref_A, human_ref_B, labels}; label 1 means that A is the better one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, reader, source_of, text_of
from caravan.types import Message, Ranking

KINDS = ("preferences",)


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if isinstance(sample, dict) and sample.keys() >= {"history", "human_ref_A", "human_ref_B"}:
        return "records hold 'history', 'human_ref_A' and 'human_ref_B'"
    return None


def convert(row: dict[str, Any], kind: str) -> Iterator[Ranking]:
    label = row.get("labels")
    if label not in (0, 1):
        raise Bad("0 or 1 under 'labels'")
    prompt = (Message("user", text_of(row, "history").strip()),)
    answers = (text_of(row, "human_ref_A"), text_of(row, "human_ref_B"))
    source = row.get("domain")
    name = id_of(row) or (row["post_id"] if isinstance(row.get("post_id"), str) else "")
    yield Ranking(
        prompt,
        answers,
        (0, 1) if label else (1, 0),
        name,
        source_of(row) or (source if isinstance(source, str) else ""),
    )


read = reader(convert)
