"""OpenAssistant trees: {prompt: {text, role, replies: [...]}}, or their messages one by one with parent_id.

As conversations, the best path of each tree: at every step the reply that people ranked first (an unranked
one where none is ranked, in the order of the file). As preferences, all ranked answers of the assistant to
one message. Deleted and rejected messages are left out, with what hangs below them; trees that are not ready
for export are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from caravan.data.formats._files import Bad, Found, Limits, OnBad, Problem, reader, records
from caravan.data.formats._turns import message_of
from caravan.types import Conversation, Message, Ranking

KINDS = ("conversations", "preferences")
_FLAT = {"message_id", "message_tree_id", "text", "role"}
_DEEPEST = 500


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if not isinstance(sample, dict):
        return None
    if isinstance(sample.get("prompt"), dict) and "replies" in sample["prompt"]:
        return "records hold a tree of replies under 'prompt'"
    return "records are messages with 'message_tree_id'" if sample.keys() >= _FLAT else None


def convert(row: dict[str, Any], kind: str) -> Iterator[Conversation | Ranking]:
    root = row.get("prompt")
    if not isinstance(root, dict):
        raise Bad("a message with replies under 'prompt'")
    if row.get("tree_state", "ready_for_export") != "ready_for_export":
        raise Bad(f"a tree that is ready for export (its state is {row['tree_state']!r})")
    if not _usable(root):
        return
    if kind == "preferences":
        yield from _rankings(root, ())
        return
    path, name = _best_path(root)
    if path:
        yield Conversation(path, name)


def _usable(node: dict[str, Any]) -> bool:
    return not node.get("deleted") and node.get("review_result") is not False


def _message(node: Any) -> Message:
    if not isinstance(node, dict) or not isinstance(node.get("text"), str):
        raise Bad("a text in every message")
    return message_of({"role": node.get("role"), "content": node["text"]})


def _replies(node: dict[str, Any]) -> list[dict[str, Any]]:
    replies = node.get("replies") or []
    if not (isinstance(replies, list) and all(isinstance(r, dict) for r in replies)):
        raise Bad("a list of messages under every 'replies'")
    return [r for r in replies if _usable(r)]


def _rank(node: dict[str, Any]) -> float:
    rank = node.get("rank")
    return float(rank) if isinstance(rank, int | float) and not isinstance(rank, bool) else float("inf")


def _best_path(root: dict[str, Any]) -> tuple[tuple[Message, ...], str]:
    """The messages down to the last answer on the best path, and that answer's id."""
    here: list[Message] = []
    answered, name = 0, ""
    node: dict[str, Any] | None = root
    while node is not None and len(here) < _DEEPEST:
        here.append(_message(node))
        if here[-1].role == "assistant":
            answered, name = len(here), str(node.get("message_id", ""))
        other = [r for r in _replies(node) if r.get("role") != node.get("role")]
        node = min(other, key=_rank) if other else None  # the first of equals
    return tuple(here[:answered]), name


def _rankings(node: dict[str, Any], before: tuple[Message, ...]) -> Iterator[Ranking]:
    if len(before) > _DEEPEST:
        raise Bad(f"trees at most {_DEEPEST} messages deep")
    here = (*before, _message(node))
    replies = _replies(node)
    ranked = [r for r in replies if _rank(r) < float("inf") and r.get("role") == "assistant"]
    if len(ranked) > 1:
        levels = sorted({_rank(r) for r in ranked})
        texts = tuple(_message(r).content for r in ranked)
        ranks = tuple(levels.index(_rank(r)) for r in ranked)
        yield Ranking(here, texts, ranks, str(node.get("message_id", "")))
    for reply in replies:
        yield from _rankings(reply, here)


_read_trees = reader(convert)


def read(path: Path, kind: str, on_bad: OnBad, limits: Limits) -> Iterator[Found]:
    first = next((row for _, row in records(path, lambda problem: None, limits)), {})
    if "prompt" in first or not first.keys() >= _FLAT:
        yield from _read_trees(path, kind, on_bad, limits)
        return
    for place, tree, problem in _gathered(path, on_bad, limits):
        try:
            if problem:
                raise Bad(problem)
            found = list(convert(tree, kind))
        except Bad as error:
            on_bad(Problem(path, place, str(error), orjson.dumps(tree, default=str).decode()[:200]))
            continue
        yield from (Found(value, "", place) for value in found)


def _gathered(path: Path, on_bad: OnBad, limits: Limits) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(place, tree, what is wrong) of each run of messages with one `message_tree_id`."""
    held: list[dict[str, Any]] = []
    start = ""
    for place, row in records(path, on_bad, limits):
        if held and row.get("message_tree_id") != held[0].get("message_tree_id"):
            yield start, *_tree(held)
            held = []
        start = start if held else place
        held.append(row)
    if held:
        yield start, *_tree(held)


def _tree(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    nodes = {str(row.get("message_id")): {**row, "replies": []} for row in rows}
    roots = [n for n in nodes.values() if not n.get("parent_id")]
    tree: dict[str, Any] = {"prompt": roots[0] if roots else None}
    if "tree_state" in rows[0]:
        tree["tree_state"] = rows[0]["tree_state"]
    lost = 0
    for node in nodes.values():
        if node.get("parent_id"):
            above = nodes.get(str(node["parent_id"]))
            lost += above is None or above is node
            if above is not None and above is not node:
                above["replies"].append(node)
    if len(roots) != 1 or lost:
        return {"prompt": rows[0]}, "messages of a tree side by side, with one that has no parent_id"
    return tree, ""
