"""What answers look like on the wire: whole, in chunks, and embeddings, as the `openai` client reads them."""

from __future__ import annotations

import base64
import sys
import time
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from caravan.serve.protocol import new_id
from caravan.types import ToolCall


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts; the stop token counts as generated."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Choice(NamedTuple):
    """One finished choice."""

    text: str
    reason: str
    calls: tuple[ToolCall, ...] = ()


class Shape(Protocol):
    """One request's answer in the words of one route. `index` tells the choices apart."""

    id: str

    def whole(self, choices: Sequence[Choice], counts: dict[str, int]) -> dict[str, Any]:
        """Everything at once, choices in order of index."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk before any text, if the route has one."""
        ...

    def text(self, index: int, text: str) -> dict[str, Any]:
        """A chunk of text."""
        ...

    def call(self, index: int, number: int, call: ToolCall) -> dict[str, Any]:
        """A chunk with a whole call, the `number`-th of its choice."""
        ...

    def end(self, index: int, reason: str) -> dict[str, Any]:
        """The chunk that says why a choice ended."""
        ...

    def usage(self, counts: dict[str, int]) -> dict[str, Any]:
        """The extra chunk at the end: no choices, the counts."""
        ...


class _Stream:
    """Same id and time in each chunk; usage null in each when the counts come at the end."""

    def __init__(self, prefix: str, kind: str, model: str, fingerprint: str, include_usage: bool) -> None:
        self.id = new_id(prefix)
        self.include_usage = include_usage
        self._kind = kind
        self._head = {
            "id": self.id,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def _whole(self, choices: Sequence[dict[str, Any]], counts: dict[str, int]) -> dict[str, Any]:
        return {**self._head, "object": self._kind, "choices": list(choices), "usage": counts}

    def _chunk(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        kind = f"{self._kind}.chunk" if self._kind.startswith("chat") else self._kind
        chunk = {**self._head, "object": kind, "choices": list(choices)}
        return {**chunk, "usage": None} if self.include_usage else chunk

    def usage(self, counts: dict[str, int]) -> dict[str, Any]:
        return {**self._chunk([]), "usage": counts}


class ChatShape(_Stream):
    """POST /v1/chat/completions."""

    def __init__(self, model: str, fingerprint: str, include_usage: bool) -> None:
        super().__init__("chatcmpl", "chat.completion", model, fingerprint, include_usage)

    def whole(self, choices: Sequence[Choice], counts: dict[str, int]) -> dict[str, Any]:
        return self._whole(
            [
                {
                    "index": index,
                    "message": _message(choice),
                    "finish_reason": choice.reason,
                    "logprobs": None,
                }
                for index, choice in enumerate(choices)
            ],
            counts,
        )

    def _delta(self, index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return self._chunk([{"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}])

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._delta(index, {"role": "assistant", "content": ""})

    def text(self, index: int, text: str) -> dict[str, Any]:
        return self._delta(index, {"content": text})

    def call(self, index: int, number: int, call: ToolCall) -> dict[str, Any]:
        return self._delta(index, {"tool_calls": [{"index": number, **_called(call)}]})

    def end(self, index: int, reason: str) -> dict[str, Any]:
        return self._delta(index, {}, reason)


def _message(choice: Choice) -> dict[str, Any]:
    """An answer; its content is null where it is calls alone."""
    found: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.calls:
        found |= {"content": choice.text or None, "tool_calls": [_called(call) for call in choice.calls]}
    return found


def _called(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


class TextShape(_Stream):
    """POST /v1/completions."""

    def __init__(self, model: str, fingerprint: str, include_usage: bool) -> None:
        super().__init__("cmpl", "text_completion", model, fingerprint, include_usage)

    @staticmethod
    def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": None}

    def whole(self, choices: Sequence[Choice], counts: dict[str, int]) -> dict[str, Any]:
        return self._whole(
            [self._choice(i, choice.text, choice.reason) for i, choice in enumerate(choices)], counts
        )

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def text(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk([self._choice(index, text, None)])

    def call(self, index: int, number: int, call: ToolCall) -> dict[str, Any]:
        raise AssertionError("a text that is continued calls nothing")

    def end(self, index: int, reason: str) -> dict[str, Any]:
        return self._chunk([self._choice(index, "", reason)])


def embeddings(
    model: str, vectors: Sequence[Sequence[float]], encoding: str, prompt_tokens: int
) -> dict[str, Any]:
    """POST /v1/embeddings. base64 is little-endian float32, which clients ask for to save bytes."""
    values: list[Any] = [list(vector) for vector in vectors]
    if encoding == "base64":
        values = [base64.b64encode(_little_endian(vector)).decode("ascii") for vector in vectors]
    data = [{"object": "embedding", "index": i, "embedding": value} for i, value in enumerate(values)]
    counts = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return {"object": "list", "data": data, "model": model, "usage": counts}


def _little_endian(vector: Sequence[float]) -> bytes:

    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()
