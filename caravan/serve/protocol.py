"""The words of the OpenAI-shaped API: what a request may say, what an answer, a chunk and an error look like.

Shapes follow the types of the `openai` Python client. Nothing here knows the engine, so that every rule of
the protocol can be tested with a fake one. Fields we do not know are ignored; fields that would change the
answer and that we cannot honour (tools, penalties, log-probabilities ...) are refused by name, never dropped
silently.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from caravan.types import Message, Sampling

MAX_CHOICES = 8
"""`n` at most: every choice is a whole generation."""
MAX_STOPS = 4
"""Stop texts per request, as in the API we follow."""
UNSUPPORTED = (
    "tools",
    "functions",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
    "audio",
)


class ApiError(Exception):
    """An error the client is told about: HTTP status and the nested body `{"error": {...}}`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code, **extra}}


class TextPart(BaseModel):
    """One part of a message given as a list; only text is understood."""

    type: Literal["text"]
    text: str


class MessageIn(BaseModel):
    """One message of the request."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]

    def message(self) -> Message:
        """As the renderer wants it: `developer` is the newer word for `system`; text parts are joined."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(BaseModel):
    """What a stream carries besides the text."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """Body of POST /v1/chat/completions."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    messages: list[MessageIn] = Field(min_length=1, max_length=1024)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stop: str | list[str] | None = None
    seed: int | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop texts")
        if any(not text for text in texts):
            raise ValueError("a stop text must not be empty")
        return stop

    @model_validator(mode="after")
    def _only_what_we_can_do(self) -> ChatRequest:
        extra = self.model_extra or {}
        for name in UNSUPPORTED:
            if extra.get(name):
                raise ValueError(f"{name} is not supported by this server")
        kind = (extra.get("response_format") or {"type": "text"}).get("type")
        if kind != "text":
            raise ValueError(f"response_format {kind!r} is not supported by this server; use 'text'")
        return self

    def sampling(self, defaults: Sampling, room: int) -> tuple[Sampling, bool]:
        """How to draw, with at most `room` new tokens. Second value: whether the client chose the seed
        itself."""
        wanted = self.max_completion_tokens or self.max_tokens or defaults.max_tokens
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        top_k = defaults.top_k if self.top_k is None else max(self.top_k, 0)
        seed = secrets.randbits(31) if self.seed is None else self.seed & 0x7FFF_FFFF_FFFF_FFFF
        sampling = Sampling(
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_k=top_k,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            max_tokens=max(1, min(wanted, room)),
            stop=stop,
            seed=seed,
        )
        return sampling, self.seed is not None


def new_id() -> str:
    """A fresh name for one answer; unguessable, so that nobody votes on another's answers by counting."""
    return "chatcmpl-" + secrets.token_hex(12)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts; the stop token counts as generated."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def completion(
    id: str, model: str, fingerprint: str, choices: Sequence[tuple[str, str]], counts: dict[str, int]
) -> dict[str, Any]:
    """The whole answer at once. `choices`: (text, finish reason) in order of index."""
    return {
        "id": id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "finish_reason": reason,
                "logprobs": None,
            }
            for index, (text, reason) in enumerate(choices)
        ],
        "usage": counts,
    }


class Chunks:
    """Makes the chunks of one stream: same id and time in each; usage null in each when it comes at the
    end."""

    def __init__(self, id: str, model: str, fingerprint: str, include_usage: bool) -> None:
        self.include_usage = include_usage
        self._head = {
            "id": id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def delta(self, index: int, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        """One piece of choice `index`."""
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        chunk = {**self._head, "choices": [choice]}
        return {**chunk, "usage": None} if self.include_usage else chunk

    def usage(self, counts: dict[str, int]) -> dict[str, Any]:
        """The extra chunk at the end: no choices, the counts."""
        return {**self._head, "choices": [], "usage": counts}


class VoteIn(BaseModel):
    """A thumb on one answer; 0 takes it back."""

    kind: Literal["vote"]
    id: str = Field(max_length=80)
    index: int = Field(default=0, ge=0, lt=MAX_CHOICES)
    vote: Literal[-1, 0, 1]


class ChoiceIn(BaseModel):
    """Of two answers to the same prompt, `chosen` was preferred (or neither, with `tie`)."""

    kind: Literal["choice"]
    chosen: str = Field(max_length=80)
    rejected: str = Field(max_length=80)
    tie: bool = False
