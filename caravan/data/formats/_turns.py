"""Turns of a conversation as the formats spell them: roles, contents, calls of tools and their results."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import orjson

from caravan.data.formats._files import Bad
from caravan.types import Message, ToolCall

ROLES = {
    "user": "human user prompter question instruction customer student usr q client 用户 人类 问 提问",
    "assistant": "gpt assistant chatgpt gpt-3.5 gpt4 gpt-4 bing bard claude model bot answer ai chatbot "
    "agent teacher vicuna moss a function_call tool_call tool_calls function-call tool-call "
    "助手 助理 答 回答 机器人",
    "system": "system developer context 系统",
    "tool": "tool function observation ipython environment function_response function-response tool_response "
    "tool-response tool_result tool-result function_result function-result 工具",
}
"""Our roles, and what others call them (in lower case)."""
_ROLE_OF = {spelling: role for role, spellings in ROLES.items() for spelling in spellings.split()}
_CALLS = {"function_call", "tool_call", "tool_calls", "function-call", "tool-call"}
_CALL_TEXT = re.compile(r"(.*?)((?:\s*<tool_call>\s*\{.*?\}\s*</tool_call>)+)\s*", re.DOTALL)
_ONE_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_RESULT_TEXT = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)


def role_of(given: Any) -> str:
    """Our word for a role, however it is spelled; Bad with the unknown one."""
    role = _ROLE_OF.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        raise Bad(f"a role such as user, human, assistant, gpt, system or tool, not {given!r}")
    return role


def message_of(turn: Any) -> Message:
    """One turn, {from, value} or {role, content}; content may be a list of text parts, or nothing beside
    calls."""
    if not isinstance(turn, dict):
        raise Bad("turns that are objects with a role and a text")
    given = next((turn[k] for k in ("role", "from", "speaker") if turn.get(k) is not None), None)
    role = role_of(given)
    calls: tuple[ToolCall, ...] = ()
    if role == "assistant":
        calls = calls_of(turn.get("tool_calls") or turn.get("function_call"))
    content = _content(turn, bool(calls))
    train = role != "assistant" or _weighs(turn)
    if isinstance(given, str) and given.strip().lower() in _CALLS:
        return Message(role, "", calls or calls_of(content), train=train)
    if role == "assistant" and not calls and (found := _CALL_TEXT.fullmatch(content)):
        made = calls_of(_ONE_CALL.findall(found.group(2)))
        return Message(role, found.group(1).strip(), made, train=train)
    if role == "tool":
        whole = _RESULT_TEXT.fullmatch(content)
        content = whole.group(1) if whole else content
        return Message(role, content, (), _text(turn, "name"), _text(turn, "tool_call_id"))
    tools = tools_of(turn.get("tools")) if role == "system" else ()
    return Message(role, content, calls, tools=tools, train=train)


def _weighs(turn: dict[str, Any]) -> bool:
    """Whether a turn carries loss: OpenAI's files say `weight` 0 of answers that do not."""
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise Bad(f"a weight of 0 or 1, not {weight!r}")
    return weight != 0


def trained(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages; Bad if there are answers and none is to be trained on."""
    answers = [m.train for m in messages if m.role == "assistant"]
    if answers and not any(answers):
        raise Bad("an answer to train on (the weight of every one is 0)")
    return messages


def _content(turn: dict[str, Any], calls: bool) -> str:
    content = next((turn[k] for k in ("content", "value", "text") if turn.get(k) is not None), None)
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) else p for p in content]
        texts = [p for p in parts if isinstance(p, str)]
        if len(texts) < len(parts):
            raise Bad("text alone in a turn (images and sound are not read)")
        content = "".join(texts)
    if content is None and calls:
        return ""
    if isinstance(content, dict) and "name" in content:  # a call that is not a text
        return orjson.dumps(content).decode()
    if not isinstance(content, str):
        raise Bad("a text in every turn")
    return content


def _text(turn: dict[str, Any], key: str) -> str:
    value = turn.get(key)
    return value if isinstance(value, str) else ""


def messages_of(turns: Any) -> tuple[Message, ...]:
    """A list of turns; Bad if it is empty or not a list. A call behind the assistant's words, or behind
    another call, belongs to the same turn."""
    if not isinstance(turns, list) or not turns:
        raise Bad("a list of turns that is not empty")
    found: list[Message] = []
    for turn in turns:
        message = message_of(turn)
        last = found[-1] if found else None
        if message.tool_calls and not message.content and last and last.role == "assistant":
            both = last.train and message.train
            found[-1] = replace(last, tool_calls=last.tool_calls + message.tool_calls, train=both)
        else:
            found.append(message)
    return tuple(found)


_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def is_transcript(text: str) -> bool:
    """Whether turns of `Human:` and `Assistant:` stand in one text, as in HH-RLHF."""
    return _SPEAKER.search("\n\n" + text.lstrip()) is not None


def transcript_of(text: str) -> tuple[Message, ...]:
    """A transcript's messages, in order; Bad if it does not begin with a speaker."""
    text = "\n\n" + text.lstrip()
    marks = list(_SPEAKER.finditer(text))
    if not marks or marks[0].start() != 0:
        raise Bad("a transcript that begins with 'Human:'")
    ends = [m.start() for m in marks[1:]] + [len(text)]
    roles = ("user" if m[1] == "Human" else "assistant" for m in marks)
    return tuple(
        Message(role, text[m.end() : end].strip()) for role, m, end in zip(roles, marks, ends, strict=True)
    )


def with_system(row: dict[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """`messages` behind the record's own system text and tools, if it has them apart."""
    system = next((row[k] for k in ("system", "system_prompt", "system_message") if row.get(k)), None)
    if isinstance(system, str) and system.strip() and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    if tools := tools_of(row.get("tools") or row.get("functions")):
        if messages[0].role == "system":
            return (replace(messages[0], tools=messages[0].tools or tools), *messages[1:])
        return (Message("system", "", tools=tools), *messages)
    return messages


# -- tools and calls -----------------------------------------------------------------------------------------


def tools_of(given: Any) -> tuple[str, ...]:
    """Definitions of tools, a list or its JSON, as {type: function, function: {name, …}} each."""
    given = _parsed(given, "tools")
    if not given:
        return ()
    rows = given if isinstance(given, list) else [given]
    found = []
    for row in rows:
        row = _parsed(row, "tools")
        body = row.get("function", row) if isinstance(row, dict) else None
        if not isinstance(body, dict) or not isinstance(body.get("name"), str) or not body["name"].strip():
            raise Bad("tools that are objects with a name")
        whole = row if body is not row else {"type": "function", "function": row}
        found.append(orjson.dumps(whole, default=str).decode())
    return tuple(found)


def calls_of(given: Any) -> tuple[ToolCall, ...]:
    """Calls, {name, arguments} or {id, function: {name, arguments}}, one or a list, or their JSON."""
    if isinstance(given, str) and not given.strip():
        raise Bad("a call as JSON (it is empty)")
    given = _parsed(given, "a call")
    if given is None:
        return ()
    return tuple(_call(row) for row in (given if isinstance(given, list) else [given]))


def _call(row: Any) -> ToolCall:
    row = _parsed(row, "a call")
    body = row.get("function", row) if isinstance(row, dict) else None
    if isinstance(body, str):  # {function: name, arguments}
        body = {**row, "name": body}
    if not isinstance(body, dict) or not isinstance(body.get("name"), str) or not body["name"].strip():
        raise Bad("calls that are objects with a name and arguments")
    given = [body[k] for k in ("arguments", "parameters", "args") if body.get(k) is not None]
    arguments: Any = given[0] if given else {}
    arguments = _parsed(arguments, f"arguments of {body['name']!r}") or {}
    if not isinstance(arguments, dict):
        raise Bad(f"arguments of {body['name']!r} that are a JSON object")
    name = row.get("id", row.get("tool_call_id"))
    text = orjson.dumps(arguments, default=str).decode()
    return ToolCall(body["name"], text, name if isinstance(name, str) else "")


def _parsed(given: Any, what: str) -> Any:
    if not isinstance(given, str) or not given.strip():
        return given or None
    try:
        return orjson.loads(given)
    except orjson.JSONDecodeError as error:
        raise Bad(f"{what} as JSON ({error})") from error


def answer_text(messages: Iterable[Message]) -> str:
    """The last turn's text, its calls written out: what a preference compares."""
    from caravan.data.tools import as_text

    return as_text(list(messages)[-1:])[0].content
