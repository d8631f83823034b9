"""Conversations with tools: the order their turns must have, and how they read where a template knows no
tools.

A tool is a JSON schema that stands with the system turn, a call is what the assistant writes, a result is a
turn of the role `tool`. Chat templates that know `tools` and `tool_calls` are handed these as they are. For
the others they become text, in the words of the Hermes and Qwen templates: `# Tools` and one JSON object a
line; `<tool_call>` around the JSON of a call.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

import orjson

from caravan.types import Message, ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def call_text(call: ToolCall) -> str:
    """`<tool_call>` with the JSON of name and arguments, a line each."""
    body = {"name": call.name, "arguments": json.loads(call.arguments)}
    return f"{OPEN}\n{json.dumps(body, ensure_ascii=False)}\n{CLOSE}"


def as_text(messages: Iterable[Message], calls: bool = True, tools: bool = True) -> list[Message]:
    """The messages with calls, and with tools, written into their contents."""
    found = []
    for message in messages:
        content = message.content
        if calls and message.tool_calls:
            parts = [content, *(call_text(c) for c in message.tool_calls)]
            message = replace(message, content="\n".join(p for p in parts if p), tool_calls=())
        if tools and message.tools:
            text = "# Tools\n" + "\n".join(message.tools)
            message = replace(message, content=f"{content}\n\n{text}" if content else text, tools=())
        found.append(message)
    return found


def name_of(tool: str) -> str:
    """The name in a tool's JSON."""
    return str(orjson.loads(tool)["function"]["name"])


def order_problem(messages: Sequence[Message], repeats: bool = False) -> str | None:
    """What was expected of the order of turns and is not there; None if all is well.

    A system turn stands first only; then users and the assistant take turns, unless `repeats` lets one speak
    twice. A call names a tool of the list, if there is a list; every call but those at the end is answered
    before anybody else speaks, and every tool turn answers a call.
    """
    known = {name_of(tool) for m in messages for tool in m.tools}
    pending: list[ToolCall] = []
    before = ""
    for turn, message in enumerate(messages, 1):
        role = message.role
        if role == "system":
            if turn > 1:
                return f"a system turn at the beginning only (turn {turn})"
            continue
        if role == "tool":
            at = _answered(message, pending)
            if at is None:
                return f"a tool turn that answers an open call (turn {turn})"
            del pending[at]
        else:
            if pending:
                return f"a result of {pending[0].name!r} before turn {turn} ({role})"
            if role == before and not repeats:
                return f"users and assistant taking turns (turn {turn} is another one of the {role})"
            if role == "user" and before == "tool":
                return f"an answer behind the results of tools before turn {turn} (user)"
            if not before and role == "assistant":
                return "a question before the first answer"
        for call in message.tool_calls:
            if known and call.name not in known:
                return f"calls of the tools that are listed (turn {turn} calls {call.name!r})"
        pending += message.tool_calls
        before = role
    return None


def _answered(message: Message, pending: Sequence[ToolCall]) -> int | None:
    """Which open call a tool turn answers: the one with its id, else the oldest one (of its name)."""
    for at, call in enumerate(pending):
        if message.tool_call_id and call.id:
            if call.id == message.tool_call_id:
                return at
        elif not message.name or message.name == call.name:
            return at
    return None


def joined(messages: Sequence[Message]) -> list[Message]:
    """Users or the assistant speaking twice in a row, joined by an empty line; calls keep turns apart."""
    found: list[Message] = []
    for message in messages:
        last = found[-1] if found else None
        if (
            last
            and last.role == message.role
            and message.role in ("user", "assistant")
            and not last.tool_calls
            and last.train == message.train
        ):
            parts = [p for p in (last.content, message.content) if p.strip()]
            found[-1] = replace(message, content="\n\n".join(parts))
        else:
            found.append(message)
    return found
