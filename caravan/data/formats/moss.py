"""MOSS: {chat: {turn_1: {Human, Inner Thoughts, Commands, Tool Responses, MOSS}}, meta_instruction}, plugins
as tools.

The marks (`<|Human|>:`, `<eoh>`) are taken off. A command such as `Search("weather"), Calculate("1+2")` is
one call per plugin with its argument under `input`; the thoughts are what the assistant says before it calls
(and are left out of turns without a command). The results are one tool turn, cut where they answer several
calls. Plugins that the meta instruction names as enabled are no schemas and stay text.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from caravan.data.formats._files import Bad, id_of, reader, source_of
from caravan.types import Conversation, Message, ToolCall

KINDS = ("conversations",)
PARTS = ("Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS")
_MARKS = re.compile(r"^\s*<\|[\w ]+\|>\s*[:：]?\s*|\s*<eo[a-z]>\s*$")
_TEXT = r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'"""
_COMMAND = re.compile(rf"""([^\W\d]\w*)\s*\(\s*((?:{_TEXT}|[^()"'])*)\s*\)\s*(?:,|$)\s*""")
_RESULT = re.compile(r"(?:^|\n)\s*[^\W\d]\w*\([^\n]*\)\s*=>")


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    chat = sample.get("chat") if isinstance(sample, dict) else None
    if isinstance(chat, dict) and chat and all(isinstance(t, dict) for t in chat.values()):
        return "records hold 'chat' with turns of Human and MOSS"
    return None


def convert(row: dict[str, Any], kind: str) -> Iterator[Conversation]:
    chat = row.get("chat")
    if not isinstance(chat, dict) or not chat:
        raise Bad("turns under 'chat'")
    messages: list[Message] = []
    meta = row.get("meta_instruction")
    if isinstance(meta, str) and meta.strip():
        messages.append(Message("system", meta.strip()))
    for name in sorted(chat, key=_number):
        messages += _turn(chat[name])
    yield Conversation(tuple(messages), id_of(row), source_of(row))


def _number(name: Any) -> int:
    digits = re.sub(r"\D", "", str(name))
    return int(digits) if digits else 0


def _turn(turn: Any) -> Iterator[Message]:
    if not isinstance(turn, dict) or not all(isinstance(turn.get(k), str) for k in ("Human", "MOSS")):
        raise Bad("a text under 'Human' and 'MOSS' of every turn")
    human, thoughts, commands, results, answer = (_plain(turn.get(k)) for k in PARTS)
    yield Message("user", human)
    calls = _calls(commands)
    if calls:
        yield Message("assistant", thoughts, calls)
        for call, result in zip(calls, _results(results, len(calls)), strict=True):
            yield Message("tool", result, name=call.name)
    yield Message("assistant", answer)


def _plain(text: Any) -> str:
    """Without the marks; None, which MOSS writes for nothing, is empty."""
    text = _MARKS.sub("", text) if isinstance(text, str) else ""
    text = _MARKS.sub("", text).strip()
    return "" if text == "None" else text


def _calls(commands: str) -> tuple[ToolCall, ...]:
    found, position = [], 0
    while position < len(commands):
        match = _COMMAND.match(commands, position)
        if not match:
            raise Bad(f'commands such as Search("…"), not {commands[position : position + 60]!r}')
        given = match.group(2).strip()
        try:
            value = ast.literal_eval(given) if given else ""
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = given  # an argument without quotes
        text = value if isinstance(value, str) else given
        found.append(ToolCall(match.group(1), orjson.dumps({"input": text}).decode()))
        position = match.end()
    return tuple(found)


def _results(text: str, count: int) -> list[str]:
    """One per call, cut at `Search("…") =>`."""
    if count == 1:
        return [text or "None"]
    starts = [m.start() for m in _RESULT.finditer(text)]
    if len(starts) != count:
        raise Bad(f"a result for each of the {count} commands of a turn (there are {len(starts)})")
    return [text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


read = reader(convert)
