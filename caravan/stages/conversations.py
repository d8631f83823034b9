"""Read conversations of any known format, check and deduplicate them, keep a part out of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from caravan.data import clean, formats, records
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.types import Conversation, UserError

INPUTS = {"raw": "raw"}
OUTPUT = "conversations"
USES: dict[str, str] = {}
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    heldout_share: float = 0.02
    """Share kept out of training, by a hash of what stands before the first answer; `"split"` in a record
    wins."""
    max_chars: int = 200_000
    """Longer conversations go to quarantine (characters)."""
    record_bytes: int = 16 << 20
    """Longer lines are not read but put into quarantine (bytes)."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    root = inputs["raw"].path
    quarantine = records.Quarantine(out / "quarantine.jsonl", root, rt.strict)
    limits = formats.Limits(record_bytes=cfg.record_bytes)
    chosen: dict[str, str] = {}
    spool = records.Spool(rt.work / "conversations.jsonl")
    known: set[str] = set()
    counts: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    for found in formats.read_all(root, "conversations", quarantine, limits, chosen):
        assert isinstance(found.value, Conversation)
        counts["read"] += 1
        conversation, repairs = _trimmed(found.value)
        counts["trimmed"] += repairs
        if problem := _problem(conversation, cfg.max_chars):
            quarantine(formats.Problem(root / found.file, found.place, problem, _shown(conversation)))
            continue
        digest = records.digest_of(*(t for m in conversation.messages for t in (m.role, m.content)))
        if digest in known:
            counts["duplicates"] += 1
            continue
        known.add(digest)
        conversation = replace(conversation, id=conversation.id or digest[:16])
        spool.add(records.dump(conversation), _key(conversation), found.split)
        _count(conversation, counts, languages)
        rt.report(counts["read"], 0, "conversations")
    if not len(spool):
        facts = quarantine.facts()
        raise UserError(
            f"no conversation is left: {counts['read']} read, {quarantine.count} quarantined",
            (facts["quarantined_first"] or ["the files hold no records"])[0],
        )
    split = records.write_splits(out, spool, cfg.heldout_share)
    return {
        "conversations": len(spool),
        **split,
        **{
            k: counts[k]
            for k in ("duplicates", "trimmed", "multi_turn", "with_system", "answers", "answer_chars")
        },
        "languages": dict(sorted(languages.items())),
        "files": len(chosen),
        "formats": dict(sorted(Counter(chosen.values()).items())),
        **quarantine.facts(),
    }


def _trimmed(conversation: Conversation) -> tuple[Conversation, int]:
    """Without an answer before any question, an open question at the end, or an empty system turn."""
    messages = list(conversation.messages)
    before = len(messages)
    if messages and messages[0].role == "system" and not messages[0].content.strip():
        messages.pop(0)
    first = 1 if messages and messages[0].role == "system" else 0
    while len(messages) > first and messages[first].role == "assistant":
        messages.pop(first)
    while messages and messages[-1].role != "assistant":
        messages.pop()
    return replace(conversation, messages=tuple(messages)), int(len(messages) != before)


def _problem(conversation: Conversation, max_chars: int) -> str | None:
    """What was expected of a conversation and is not there."""
    messages = conversation.messages
    if not messages:
        return "a question with an answer behind it"
    if any(m.role == "system" for m in messages[1:]):
        return "a system turn at the beginning only"
    if any(not m.content.strip() for m in messages):
        empty = next(k for k, m in enumerate(messages) if not m.content.strip())
        return f"turns with a text (turn {empty + 1}, {messages[empty].role}, is empty)"
    if (size := sum(len(m.content) for m in messages)) > max_chars:
        return f"at most {max_chars:,} characters (there are {size:,})"
    return None


def _key(conversation: Conversation) -> str:
    first = next(k for k, m in enumerate(conversation.messages) if m.role == "assistant")
    return records.digest_of(*(m.content for m in conversation.messages[:first]))


def _count(conversation: Conversation, counts: Counter[str], languages: Counter[str]) -> None:
    answers = [m.content for m in conversation.messages if m.role == "assistant"]
    counts["answers"] += len(answers)
    counts["answer_chars"] += sum(map(len, answers))
    counts["multi_turn"] += len(answers) > 1
    counts["with_system"] += conversation.messages[0].role == "system"
    languages[clean.language(answers[0], 500)] += 1


def _shown(conversation: Conversation) -> str:
    return " | ".join(f"{m.role}: {m.content[:60]}" for m in conversation.messages)[:200]
