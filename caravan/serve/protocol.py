"""The words of the OpenAI-shaped API: what a request may say, what an error looks like
(answers: shapes.py).

Shapes follow the types of the `openai` Python client. Nothing here knows the engine, so that every rule of
the protocol can be tested with a fake one. Fields we do not know are ignored; fields that would change the
answer and that we cannot honour (penalties, log-probabilities ...) are refused by name, never dropped
silently.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import from_json

from caravan.types import Message, Sampling, ToolCall

MAX_CHOICES = 8
"""`n` at most: every choice is a whole generation."""
MAX_STOPS = 4
"""Stop texts per request, as in the API we follow."""
MAX_TOOLS = 128
"""Tools per request."""
MAX_INPUTS = 256
"""Texts per request for embeddings; prompts of a completion times their choices are at most MAX_CHOICES."""
UNSUPPORTED = (
    "functions",
    "function_call",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
    "audio",
    "echo",
    "suffix",
)

Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Texts = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
    | Ids
    | Annotated[list[Ids], Field(min_length=1, max_length=MAX_INPUTS)]
)
"""One text, several, one list of token ids, or several."""


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


class FunctionCallIn(BaseModel):
    """What an assistant's message of the request called, with arguments as JSON."""

    name: str = Field(min_length=1)
    arguments: str = "{}"

    @field_validator("arguments")
    @classmethod
    def _an_object(cls, arguments: str) -> str:
        try:
            given = from_json(arguments or "{}")  # unlike json.loads, of bounded depth
        except ValueError as problem:
            raise ValueError(f"arguments are no JSON ({problem})") from problem
        if not isinstance(given, dict):
            raise ValueError("arguments must be a JSON object")
        return arguments or "{}"


class CallIn(BaseModel):
    """One call in an assistant's message."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCallIn


class FunctionIn(BaseModel):
    """What a tool is."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=r"^[\w.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolIn(BaseModel):
    """A tool that the model may call."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: FunctionIn


class MessageIn(BaseModel):
    """One message of the request."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[CallIn] | None = None
    tool_call_id: str = ""
    name: str = ""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing (only an assistant with tool_calls needs none)")
        return self

    def message(self) -> Message:
        """As the renderer wants it: `developer` is the newer word for `system`; text parts are joined."""
        given = self.content or ""
        text = given if isinstance(given, str) else "".join(part.text for part in given)
        if self.role == "assistant":
            calls = (ToolCall(c.function.name, c.function.arguments, c.id) for c in self.tool_calls or ())
            return Message("assistant", text, tuple(calls))
        if self.role == "tool":
            return Message("tool", text, name=self.name, tool_call_id=self.tool_call_id)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(BaseModel):
    """What a stream carries besides the text."""

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What every request for generated text may say about how to draw it."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
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
    def _only_what_we_can_do(self) -> Self:
        extra = self.model_extra or {}
        for name in UNSUPPORTED:
            if extra.get(name):
                raise ValueError(f"{name} is not supported by this server")
        kind = (extra.get("response_format") or {"type": "text"}).get("type")
        if kind != "text":
            raise ValueError(f"response_format {kind!r} is not supported by this server; use 'text'")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, defaults: Sampling) -> Sampling:
        """How to draw; a request without a seed gets one of its own."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        wanted = self.max_completion_tokens or self.max_tokens or defaults.max_tokens
        seed = secrets.randbits(31) if self.seed is None else self.seed & 0x7FFF_FFFF_FFFF_FFFF
        return Sampling(
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_k=defaults.top_k if self.top_k is None else max(self.top_k, 0),
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            max_tokens=min(wanted, defaults.max_tokens),
            stop=stop,
            seed=seed,
        )


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[MessageIn] = Field(min_length=1, max_length=1024)
    tools: list[ToolIn] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Any = None

    @model_validator(mode="after")
    def _choice_is_the_models(self) -> Self:
        if self.tools and self.tool_choice not in (None, "auto", "none"):
            raise ValueError("tool_choice is not supported by this server but for 'auto' and 'none'")
        if self.tools and (self.model_extra or {}).get("parallel_tool_calls") is False:
            raise ValueError("parallel_tool_calls: false is not supported by this server")
        return self

    @property
    def offered(self) -> list[str]:
        """Names of the tools that may be called."""
        return [] if self.tool_choice == "none" else [tool.function.name for tool in self.tools or ()]

    def conversation(self) -> list[Message]:
        """The messages, with the tools in the system message (one without text if there is none)."""
        messages = [message.message() for message in self.messages]
        if not self.offered:
            return messages
        tools = tuple(tool.model_dump_json(exclude_unset=True) for tool in self.tools or ())
        if messages[0].role == "system":
            return [replace(messages[0], tools=tools), *messages[1:]]
        return [Message("system", "", tools=tools), *messages]


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions: text that is continued as it stands, without a chat template."""

    prompt: Texts

    @model_validator(mode="after")
    def _few_choices(self) -> Self:
        if len(inputs(self.prompt)) * self.n > MAX_CHOICES:
            raise ValueError(f"at most {MAX_CHOICES} answers per request (prompts times n)")
        if (self.model_extra or {}).get("best_of") not in (None, 1, self.n):
            raise ValueError("best_of is not supported by this server")
        return self


class EmbeddingRequest(BaseModel):
    """Body of POST /v1/embeddings."""

    model: str = ""
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)


def inputs(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The texts or id lists of a request, one by one."""
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [[int(id) for id in given]]  # type: ignore[arg-type]
    return list(given)  # type: ignore[arg-type]


def new_id(prefix: str = "chatcmpl") -> str:
    """A fresh name for one answer; unguessable, so that nobody votes on another's answers by counting."""
    return f"{prefix}-{secrets.token_hex(12)}"


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
