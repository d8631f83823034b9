"""OpenAssistant trees: {prompt: {text, role, replies: [...]}}; threads as conversations, ranked siblings as
rankings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, message_of, reader
from caravan.types import Conversation, Message, Ranking

KINDS = ("conversations", "preferences")


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if isinstance(sample, dict) and isinstance(sample.get("prompt"), dict) and "replies" in sample["prompt"]:
        return "records hold a tree of replies under 'prompt'"
    return None


def convert(row: dict[str, Any], kind: str) -> Iterator[Conversation | Ranking]:
    root = row.get("prompt")
    if not isinstance(root, dict):
        raise Bad("a message with replies under 'prompt'")
    yield from (_threads if kind == "conversations" else _rankings)(root, ())


def _message(node: Any) -> Message:
    if not isinstance(node, dict) or not isinstance(node.get("text"), str):
        raise Bad("a text in every message")
    return message_of({"role": node.get("role"), "content": node["text"]})


def _replies(node: dict[str, Any]) -> list[dict[str, Any]]:
    replies = node.get("replies") or []
    if not (isinstance(replies, list) and all(isinstance(r, dict) for r in replies)):
        raise Bad("a list of messages under every 'replies'")
    return [r for r in replies if not r.get("deleted")]


def _threads(node: dict[str, Any], before: tuple[Message, ...]) -> Iterator[Conversation]:
    """Every way from the root to a leaf; a question left open at the end is dropped."""
    here = (*before, _message(node))
    replies = _replies(node)
    answered = [r for r in replies if here[-1].role != "user" or r.get("role") == "assistant"]
    for reply in answered:
        yield from _threads(reply, here)
    open_end = all(not _answers_below(r) for r in answered)
    if here[-1].role == "assistant" and open_end:
        yield Conversation(here, str(node.get("message_id", "")))


def _answers_below(node: dict[str, Any]) -> bool:
    return node.get("role") == "assistant" or any(_answers_below(r) for r in _replies(node))


def _rankings(node: dict[str, Any], before: tuple[Message, ...]) -> Iterator[Ranking]:
    here = (*before, _message(node))
    replies = _replies(node)
    ranked = [r for r in replies if isinstance(r.get("rank"), int) and r.get("role") == "assistant"]
    if len(ranked) > 1:
        levels = sorted({r["rank"] for r in ranked})
        texts = tuple(_message(r).content for r in ranked)
        ranks = tuple(levels.index(r["rank"]) for r in ranked)
        yield Ranking(here, texts, ranks, str(node.get("message_id", "")))
    for reply in replies:
        yield from _rankings(reply, here)


read = reader(convert)
