"""One request for text on its way: admitted, answered whole or in pieces, remembered for votes, counted.

It watches the connection in both modes (Starlette does not cancel handlers that do not stream): who hangs up
frees the engine's blocks within a step. Prompts are never logged; one line per request says how long it was
and how it ended.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from secrets import token_hex
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from caravan.data.calls import Reader, Spelling
from caravan.data.tools import as_text
from caravan.serve.feedback import Answer, FeedbackStore
from caravan.serve.metrics import Metrics
from caravan.serve.protocol import ApiError, ChatRequest, CompletionRequest, GenerationRequest, inputs
from caravan.serve.shapes import ChatShape, Choice, Shape, TextShape, usage
from caravan.serve.worker import Draining, Piece, QueueFull, Ticket, Worker
from caravan.types import Message, Sampling, ToolCall, UserError

log = logging.getLogger("caravan.serve")
POLL_SECONDS = 0.1
"""How often a silent connection is asked whether somebody still listens."""
PING_SECONDS = 15.0
"""A comment this often keeps proxies from closing a stream that waits in the queue."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model as the server knows it."""

    name: str
    worker: Worker
    render: Callable[[list[Message]], list[int]]
    """Messages to the ids of the served prompt (the one renderer, with the generation prompt)."""
    calls: Spelling | None = None
    """How its chat template writes tool calls; None: in no way that can be read back."""
    encode: Callable[[str], list[int]] | None = None
    """Plain text to ids, for completions and embeddings; None: only ids are understood there."""
    context_length: int
    """Prompt and answer together, tokens."""
    weights: str = ""
    """Id of the artefact the weights are from; recorded with each answer somebody votes on."""
    defaults: Sampling = field(default_factory=Sampling)
    """What a request that says nothing gets; max_tokens is also the cap."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        """Changes with the weights."""
        return f"fp_{(self.weights or self.name)[:12]}"

    def plain(self, given: str | list[int], param: str) -> list[int]:
        """Ids of a text (or the ids themselves) outside any chat; ApiError when they do not fit."""
        if not isinstance(given, str):
            ids = given
        elif self.encode is None:
            raise ApiError(400, "this model takes token ids only here", param=param)
        else:
            ids = self.encode(given)
        if not ids:
            raise ApiError(400, f"{param} is empty", param=param)
        return ids

    def check_room(self, ids: Sequence[int], param: str, answer: bool = True) -> None:
        """ApiError when `ids` (and, with `answer`, one more token) do not fit into the context."""
        limit = self.context_length
        if len(ids) + answer > limit:
            must = f"this model's context of {limit} must hold the answer too"
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens; {must if answer else f'this model takes {limit}'}",
                param=param,
                code="context_length_exceeded",
                n_prompt_tokens=len(ids),
                n_ctx=limit,
            )


def refusal(problem: QueueFull | Draining) -> ApiError:
    """What a client is told whom the worker does not take."""
    if isinstance(problem, QueueFull):
        wait = {"Retry-After": str(problem.retry_after)}
        return ApiError(429, str(problem), type="rate_limit_error", code="queue_full", headers=wait)
    return ApiError(503, str(problem), type="unavailable_error", headers={"Retry-After": "5"})


def engine_error(problem: Exception) -> ApiError:
    """A deterministic failure must be a 4xx: clients repeat a 5xx."""
    if isinstance(problem, TimeoutError):
        return ApiError(503, str(problem), type="unavailable_error", headers={"Retry-After": "5"})
    if isinstance(problem, (UserError, ValueError)):
        return ApiError(400, str(problem))
    return ApiError(500, "the engine failed on this request; the server goes on", type="server_error")


def chat_turn(
    request: Request, asked: ChatRequest, model: ServedModel, feedback: FeedbackStore | None, metrics: Metrics
) -> Turn:
    """The turn of POST /v1/chat/completions; its answers can be voted on."""
    messages = asked.conversation()
    if asked.offered and model.calls is None:
        raise ApiError(
            400,
            "this model's chat template writes tool calls in a way that cannot be read back; ask without "
            "tools, or give the model another template (`caravan template`)",
            param="tools",
        )
    try:
        ids = model.render(messages)
    except UserError as problem:
        raise ApiError(400, str(problem), param="messages") from problem
    except ValueError as problem:
        raise ApiError(400, f"the messages cannot be rendered: {problem}", param="messages") from problem
    model.check_room(ids, "messages")
    shape = ChatShape(model.name, model.fingerprint, asked.wants_usage)
    turn = Turn(request, asked, model, [ids], shape, metrics, "chat")
    if asked.offered and model.calls is not None:
        turn.readers = [Reader(model.calls, asked.offered) for _ in range(asked.n)]
    if feedback is not None:
        turn.feedback, turn.messages = feedback, messages
    return turn


def completion_turn(request: Request, asked: CompletionRequest, model: ServedModel, metrics: Metrics) -> Turn:
    """The turn of POST /v1/completions."""
    prompts = [model.plain(given, "prompt") for given in inputs(asked.prompt)]
    for ids in prompts:
        model.check_room(ids, "prompt")
    shape = TextShape(model.name, model.fingerprint, asked.wants_usage)
    return Turn(request, asked, model, prompts, shape, metrics, "completions")


class Turn:
    """One request on its way through the worker: prompts times n choices, all in one queue."""

    def __init__(
        self,
        request: Request,
        asked: GenerationRequest,
        model: ServedModel,
        prompts: list[list[int]],
        shape: Shape,
        metrics: Metrics,
        route: str,
    ) -> None:
        self.request, self.asked, self.model, self.shape = request, asked, model, shape
        self.metrics, self.route = metrics, route
        self.prompts = prompts
        self.messages: list[Message] = []
        self.feedback: FeedbackStore | None = None
        choices = len(prompts) * asked.n
        self.readers: list[Reader] = []
        """Of each choice, where tools may be called."""
        self.texts = [""] * choices
        self.calls: list[tuple[ToolCall, ...]] = [()] * choices
        self.reasons: list[str | None] = [None] * choices
        self.tokens = 0
        self.begun = time.monotonic()
        self.first_token: float | None = None
        self.last_piece: list[float | None] = [None] * choices
        self.pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self.ticket: Ticket | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum(len(ids) for ids in self.prompts)

    def admit(self) -> None:
        """Into the queue, or an ApiError that says why not."""
        sampling = self.asked.sampling(self.model.defaults)
        limit = self.model.context_length
        each = [replace(sampling, max_tokens=min(sampling.max_tokens, limit - len(p))) for p in self.prompts]
        loop = asyncio.get_running_loop()

        def deliver(piece: Piece) -> None:
            loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

        wanted = list(zip(self.prompts, each, strict=True))
        try:
            self.ticket = self.model.worker.submit_all(wanted, deliver, self.asked.n)
        except (QueueFull, Draining) as problem:
            raise refusal(problem) from problem
        self.metrics.count("prompt_tokens", self.prompt_tokens, model_name=self.model.name)

    async def _next(self) -> Piece | None:
        """The next piece, None after a moment of silence; `abort` pieces end everything when nobody
        listens."""
        try:
            return await asyncio.wait_for(self.pieces.get(), POLL_SECONDS)
        except TimeoutError:
            return None

    async def _listens(self) -> bool:
        return not await self.request.is_disconnected()

    def _take(self, piece: Piece) -> list[str | ToolCall]:
        """Count a piece, and give the words and calls in it; raises when it carries an error."""
        if piece.error is not None:
            raise engine_error(piece.error)
        self.tokens += piece.tokens
        if piece.tokens:
            now, name = time.monotonic(), self.model.name
            last = self.last_piece[piece.index]
            if self.first_token is None:
                self.first_token = now
                self.metrics.observe("time_to_first_token_seconds", now - self.begun, model_name=name)
            if last is not None:
                each = (now - last) / piece.tokens
                self.metrics.observe("time_per_output_token_seconds", each, piece.tokens, model_name=name)
            self.last_piece[piece.index] = now
        if piece.finish_reason is not None:
            self.reasons[piece.index] = piece.finish_reason
        return self._read(piece)

    def _read(self, piece: Piece) -> list[str | ToolCall]:
        """A piece's words and calls, noted; calls get their ids here."""
        parts: list[str | ToolCall] = [piece.text] if piece.text else []
        if self.readers:
            parts = self.readers[piece.index].feed(piece.text, last=piece.finish_reason is not None)
        # Nine letters and digits: what the strictest templates (Mistral's) want of an id.
        parts = [replace(p, id=token_hex(5)[:9]) if isinstance(p, ToolCall) else p for p in parts]
        self.texts[piece.index] += "".join(p for p in parts if isinstance(p, str))
        self.calls[piece.index] += tuple(p for p in parts if isinstance(p, ToolCall))
        return parts

    def _reason(self, index: int) -> str:
        """Why a choice ended, as clients know it."""
        reason = _public(self.reasons[index])
        return "tool_calls" if reason == "stop" and self.calls[index] else reason

    @property
    def done(self) -> bool:
        return all(reason is not None for reason in self.reasons)

    async def whole(self) -> Response:
        """Wait for all choices."""
        outcome = "error"
        try:
            while not self.done:
                piece = await self._next()
                if piece is not None:
                    self._take(piece)
                # Asked also between pieces: a busy engine must not hide that the client is gone.
                if (piece is None or self.tokens % 16 == 0) and not await self._listens():
                    outcome = "abort"
                    return Response(status_code=499)
            outcome = ",".join(str(reason) for reason in self.reasons)
            self._remember()
            choices = [
                Choice(text, self._reason(index), self.calls[index]) for index, text in enumerate(self.texts)
            ]
            return JSONResponse(self.shape.whole(choices, usage(self.prompt_tokens, self.tokens)))
        finally:
            self._end(outcome)

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events: role first (chat), text as it comes, finish reason, usage if asked, [DONE]."""
        outcome, quiet_since = "abort", time.monotonic()
        try:
            for index in range(len(self.texts)):
                opening = self.shape.opening(index)
                if opening is not None:
                    yield _event(opening)
            while not self.done:
                piece = await self._next()
                if not await self._listens():
                    return
                if piece is None:
                    if time.monotonic() - quiet_since > PING_SECONDS:
                        quiet_since = time.monotonic()
                        yield b": ping\n\n"
                    continue
                number = len(self.calls[piece.index])
                parts = self._take(piece)
                quiet_since = time.monotonic()
                for part in parts:
                    if isinstance(part, str):
                        yield _event(self.shape.text(piece.index, part))
                    else:
                        yield _event(self.shape.call(piece.index, number, part))
                        number += 1
                if piece.finish_reason is not None:
                    yield _event(self.shape.end(piece.index, self._reason(piece.index)))
            self._remember()
            outcome = ",".join(str(reason) for reason in self.reasons)
            if self.asked.wants_usage:
                yield _event(self.shape.usage(usage(self.prompt_tokens, self.tokens)))
            yield b"data: [DONE]\n\n"
        except ApiError as error:  # too late for a status: the client raises on this event
            outcome = "error"
            yield _event(error.body)
        finally:
            self._end(outcome)

    def _remember(self) -> None:
        if self.feedback is None:
            return
        for index, (text, reason) in enumerate(zip(self.texts, self.reasons, strict=True)):
            if reason in ("stop", "length"):
                said = as_text([Message("assistant", text, self.calls[index])])[0].content
                self.feedback.remember(
                    Answer(
                        id=answer_id(self.shape.id, index),
                        prompt=tuple(self.messages),
                        text=said,
                        model=self.model.name,
                        weights=self.model.weights,
                        finish_reason=reason,
                    )
                )

    def _end(self, outcome: str) -> None:
        if self.ticket is not None and not self.done:
            self.ticket.cancel()
        now, name = time.monotonic(), self.model.name
        waited = None if self.ticket is None else self.ticket.waited
        self.metrics.count("generation_tokens", self.tokens, model_name=name)
        self.metrics.observe("e2e_request_latency_seconds", now - self.begun, model_name=name)
        if waited is not None:
            self.metrics.observe("request_queue_time_seconds", waited, model_name=name)
        for reason in sorted(set(outcome.split(","))):
            self.metrics.count("requests", model_name=name, route=self.route, outcome=reason)
        log.info(
            "%s model=%s in=%d out=%d first=%.3fs total=%.3fs end=%s",
            self.shape.id,
            name,
            self.prompt_tokens,
            self.tokens,
            (self.first_token or now) - self.begun,
            now - self.begun,
            outcome,
        )


def answer_id(completion_id: str, index: int) -> str:
    """Name of one choice of a completion, for feedback."""
    return f"{completion_id}-{index}"


def _public(reason: str | None) -> str:
    """Clients know stop and length; a generation cut by the server reads as too long."""
    return "stop" if reason == "stop" else "length"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
