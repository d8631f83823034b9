"""Read conversations of any known format, check and deduplicate them, keep a part out of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from caravan.data import records
from caravan.stage import Runtime
from caravan.stages._intake import Intake, Languages, Reading, Sizes
from caravan.store import Artefact
from caravan.types import Conversation

INPUTS = {"raw": "raw", "benchmarks": "raw?"}
OUTPUT = "conversations"
USES: dict[str, str] = {}
VERSION = 4


@dataclass(frozen=True, kw_only=True)
class Config(Reading):
    heldout_share: float = 0.02
    """Share kept out of training, by a hash of what stands before the first answer; `"split"` in a record
    wins."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    intake = Intake(OUTPUT, cfg, inputs, out, rt)
    shelf = intake.shelf("conversations")
    for found in intake.found("conversations"):
        assert isinstance(found.value, Conversation)
        conversation, repairs = _trimmed(found.value)
        intake.counts["trimmed"] += repairs
        messages, problem = intake.ordered(conversation.messages)
        conversation = replace(conversation, messages=messages)
        if problem := _problem(conversation, cfg.max_chars) or problem:
            intake.refuse(found, problem, _shown(conversation))
            continue
        digest = records.digest_of(*records.words_of(messages))
        conversation = replace(conversation, id=conversation.id or digest[:16])
        text = "\n".join(m.content for m in messages if m.role != "system")
        line, key = records.dump(conversation), _key(conversation)
        shelf.add(line, conversation.id, digest, key, found.split, text)
    intake.need(len(shelf), "conversation")
    tally = _Tally()
    written = shelf.write(out, cfg.heldout_share, tally.note)
    return {
        "conversations": written["train"] + written["heldout"],
        **written,
        "trimmed": intake.counts["trimmed"],
        "joined": intake.counts["joined"],
        **tally.facts(),
        **intake.facts(),
    }


def _trimmed(conversation: Conversation) -> tuple[Conversation, int]:
    """Without an answer before any question, an open question at the end, or an empty system turn."""
    messages = list(conversation.messages)
    before = len(messages)
    if (
        messages
        and messages[0].role == "system"
        and not messages[0].content.strip()
        and not messages[0].tools
    ):
        messages.pop(0)
    first = 1 if messages and messages[0].role == "system" else 0
    while len(messages) > first and messages[first].role == "assistant":
        messages.pop(first)
    while messages and messages[-1].role != "assistant":
        messages.pop()
    return replace(conversation, messages=tuple(messages)), int(len(messages) != before)


def _problem(conversation: Conversation, max_chars: int) -> str | None:
    """What was expected of the contents and is not there."""
    messages = conversation.messages
    if not messages:
        return "a question with an answer behind it"
    for turn, m in enumerate(messages, 1):
        if m.role != "tool" and not (m.content.strip() or m.tool_calls or m.tools):
            return f"turns with a text (turn {turn}, {m.role}, is empty)"
    if (size := sum(len(m.content) for m in messages)) > max_chars:
        return f"at most {max_chars:,} characters (there are {size:,})"
    return None


def _key(conversation: Conversation) -> str:
    first = next(k for k, m in enumerate(conversation.messages) if m.role == "assistant")
    return records.digest_of(*(m.content for m in conversation.messages[:first]))


class _Tally:
    """Counts of what was kept (near duplicates that are dropped afterwards included)."""

    def __init__(self) -> None:
        self.counts = Counter(
            dict.fromkeys(
                ("multi_turn", "with_system", "with_tools", "tool_calls", "answers", "answer_chars"), 0
            )
        )
        self.turns: Counter[int] = Counter()
        self.languages = Languages()
        self.questions, self.answers = Sizes(), Sizes()

    def note(self, numbers: np.ndarray, lines: Sequence[bytes]) -> None:
        for line in lines:
            self.add(records.conversation_of(orjson.loads(line)))

    def add(self, conversation: Conversation) -> None:
        messages = conversation.messages
        answers = [m for m in messages if m.role == "assistant"]
        calls = sum(len(m.tool_calls) for m in answers)
        self.counts.update(
            answers=len(answers),
            answer_chars=sum(len(m.content) for m in answers),
            multi_turn=int(sum(m.role == "user" for m in messages) > 1),
            with_system=int(messages[0].role == "system" and bool(messages[0].content.strip())),
            with_tools=int(bool(calls) or any(m.tools for m in messages)),
            tool_calls=calls,
        )
        self.turns[min(len(answers), 20)] += 1
        for m in messages:
            if m.role in ("user", "assistant"):
                (self.answers if m.role == "assistant" else self.questions).add(len(m.content))
        self.languages.add(" ".join(m.content for m in messages if m.role in ("user", "assistant")))

    def facts(self) -> dict[str, Any]:
        return {
            **self.counts,
            "answers_per_conversation": {str(k): n for k, n in sorted(self.turns.items())},
            "question_chars": self.questions.facts(),
            "answer_chars_spread": self.answers.facts(),
            "languages": self.languages.facts(),
        }


def _shown(conversation: Conversation) -> str:
    return " | ".join(f"{m.role}: {m.content[:60]}" for m in conversation.messages)
