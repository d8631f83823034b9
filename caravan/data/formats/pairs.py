"""Pairs: {prompt, chosen, rejected}, each a text or a list of messages; or {conversations, chosen, rejected}.

The prompt may also stand under `messages`, `question` or `instruction` (with `input`), and be a transcript
from `Human:` to `Assistant:`: the space with which answers then begin belongs to the transcript and is cut
off, so that the same answers in the format `hh` are the same texts. Where there is no prompt, `chosen` and
`rejected` are whole conversations that differ in the last answer. Where `score_chosen` and `score_rejected`
are equal, the two are a tie.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, reader, source_of, text_of
from caravan.data.formats._turns import answer_text, message_of, messages_of, transcript_of, with_system
from caravan.types import Message, Ranking

KINDS = ("preferences",)
PROMPTS = ("prompt", "conversations", "question", "instruction", "input", "messages")


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if not isinstance(sample, dict) or not sample.keys() >= {"chosen", "rejected"}:
        return None
    key = next((k for k in PROMPTS if k in sample), None)
    if key is not None:
        return f"records hold {key!r}, 'chosen' and 'rejected'"
    if isinstance(sample["chosen"], list) and isinstance(sample["rejected"], list):
        return "'chosen' and 'rejected' are lists of messages"
    return None


def prompt_of(row: dict[str, Any]) -> tuple[Message, ...]:
    """The messages before the answers; empty if the record has no prompt of its own."""
    key = next((k for k in PROMPTS if k in row), None)
    if key is None:
        return ()
    if isinstance(row[key], list):
        return with_system(row, messages_of(row[key]))
    text, extra = text_of(row, key), row.get("input")
    text = f"{text}\n{extra}" if key == "instruction" and isinstance(extra, str) and extra.strip() else text
    if goes_on(text):
        return with_system(row, transcript_of(text)[:-1])
    return with_system(row, (Message("user", text),))


def goes_on(prompt: Any) -> bool:
    """Whether a prompt is a transcript that breaks off behind `Assistant:`, for the answer to go on."""
    return (
        isinstance(prompt, str)
        and prompt.lstrip().startswith("Human:")
        and prompt.rstrip().endswith("\n\nAssistant:")
    )


def answer_of(
    given: Any, row: dict[str, Any], prompt: tuple[Message, ...], name: str
) -> tuple[tuple[Message, ...], str]:
    """(messages before, text) of an answer of `row` that is a text, a message, or a list that may repeat the
    prompt."""
    if isinstance(given, str):
        return prompt, given.strip() if goes_on(next((row[k] for k in PROMPTS if k in row), None)) else given
    turns = (message_of(given),) if isinstance(given, dict) else messages_of(given)
    if turns[-1].role != "assistant":
        raise Bad(f"{name!r} to end with an answer of the assistant")
    return (turns[:-1] or prompt), answer_text(turns)


def convert(row: dict[str, Any], kind: str) -> Iterator[Ranking]:
    for name in ("chosen", "rejected"):
        if name not in row:
            raise Bad(f"an answer under {name!r}")
    # beside two whole conversations, `messages` is a third one, with the answer in it
    whole = all(isinstance(row[name], list) and len(row[name]) > 1 for name in ("chosen", "rejected"))
    prompt = () if whole and not row.keys() & set(PROMPTS[:-1]) else prompt_of(row)
    before, chosen = answer_of(row["chosen"], row, prompt, "chosen")
    other, rejected = answer_of(row["rejected"], row, prompt, "rejected")
    if before != other:
        raise Bad("'chosen' and 'rejected' to be the same up to the last answer")
    if prompt and before and prompt[0].role == "system" and before[0].role != "system":
        before = (prompt[0], *before)
    scores = [row.get("score_chosen"), row.get("score_rejected")]
    tie = all(isinstance(s, int | float) for s in scores) and scores[0] == scores[1]
    yield Ranking(before, (chosen, rejected), (0, 0 if tie else 1), id_of(row), source_of(row))


read = reader(convert)
