"""Schema-guided dialogues: {dialogue_id, turns: [{speaker: USER|SYSTEM, utterance, frames}]}; service calls
become tool calls with their results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from caravan.data.formats._files import Bad, reader, source_of, text_of
from caravan.types import Conversation, Message, ToolCall

KINDS = ("conversations",)
_ROLE = {"USER": "user", "SYSTEM": "assistant"}


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    turns = sample.get("turns") if isinstance(sample, dict) else None
    if isinstance(turns, list) and turns and all(isinstance(t, dict) and "utterance" in t for t in turns):
        return "records hold 'turns' with a speaker and an utterance"
    return None


def convert(row: dict[str, Any], kind: str) -> Iterator[Conversation]:
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns:
        raise Bad("a list of turns that is not empty")
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("speaker") not in _ROLE:
            raise Bad("turns of the speakers USER and SYSTEM")
        role = _ROLE[turn["speaker"]]
        if role == "assistant":
            messages += _service(turn.get("frames"))
        messages.append(Message(role, text_of(turn, "utterance")))
    name = row.get("dialogue_id")
    yield Conversation(tuple(messages), name if isinstance(name, str) else "", source_of(row))


def _service(frames: Any) -> list[Message]:
    """The call of a turn and what it gave."""
    frames = [f for f in frames if isinstance(f, dict)] if isinstance(frames, list) else []
    calls = []
    results = []
    for frame in frames:
        call = frame.get("service_call")
        if isinstance(call, dict):
            name, parameters = call.get("method"), call.get("parameters")
            if not isinstance(name, str) or not name or not isinstance(parameters, dict):
                raise Bad("a method and parameters in every service call")
            calls.append(ToolCall(name, orjson.dumps(parameters).decode()))
            given = orjson.dumps(frame.get("service_results") or []).decode()
            results.append(Message("tool", given, name=name))
    return [Message("assistant", "", tuple(calls)), *results] if calls else []


read = reader(convert)
