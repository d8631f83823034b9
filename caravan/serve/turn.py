"""One chat request on its way: rendered, admitted, answered whole or in pieces, remembered for votes.

It watches the connection in both modes (Starlette does not cancel handlers that do not stream): who hangs up
frees the engine's blocks within a step. Prompts are never logged; one line per request says how long it was
and how it ended.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from caravan.serve import protocol
from caravan.serve.feedback import Answer, FeedbackStore
from caravan.serve.protocol import ApiError, ChatRequest, Chunks
from caravan.serve.worker import Draining, Piece, QueueFull, Ticket, Worker
from caravan.types import Message, Sampling, UserError

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


class Turn:
    """One request on its way through the worker."""

    def __init__(
        self, request: Request, asked: ChatRequest, model: ServedModel, feedback: FeedbackStore | None
    ) -> None:
        self.request, self.asked, self.model, self.feedback = request, asked, model, feedback
        self.id = protocol.new_id()
        self.messages = [message.message() for message in asked.messages]
        self.prompt_ids = self._prompt()
        self.texts = [""] * asked.n
        self.reasons: list[str | None] = [None] * asked.n
        self.tokens = 0
        self.begun = time.monotonic()
        self.first_token: float | None = None
        self.pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self.ticket: Ticket | None = None

    def _prompt(self) -> list[int]:
        try:
            ids = self.model.render(self.messages)
        except UserError as problem:
            raise ApiError(400, str(problem), param="messages") from problem
        except ValueError as problem:
            raise ApiError(400, f"the messages cannot be rendered: {problem}", param="messages") from problem
        limit = self.model.context_length
        if len(ids) >= limit:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens; this model's context of {limit} must hold the answer too",
                param="messages",
                code="context_length_exceeded",
                n_prompt_tokens=len(ids),
                n_ctx=limit,
            )
        return ids

    def admit(self) -> None:
        """Into the queue, or an ApiError that says why not."""
        room = min(self.model.context_length - len(self.prompt_ids), self.model.defaults.max_tokens)
        sampling, _ = self.asked.sampling(self.model.defaults, room)
        loop = asyncio.get_running_loop()

        def deliver(piece: Piece) -> None:
            loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

        try:
            self.ticket = self.model.worker.submit(self.prompt_ids, sampling, deliver, self.asked.n)
        except QueueFull as full:
            wait = {"Retry-After": str(full.retry_after)}
            raise ApiError(429, str(full), type="rate_limit_error", code="queue_full", headers=wait) from full
        except Draining as closing:
            raise ApiError(
                503, str(closing), type="unavailable_error", headers={"Retry-After": "5"}
            ) from closing

    async def _next(self) -> Piece | None:
        """The next piece, None after a moment of silence; `abort` pieces end everything when nobody
        listens."""
        try:
            return await asyncio.wait_for(self.pieces.get(), POLL_SECONDS)
        except TimeoutError:
            return None

    async def _listens(self) -> bool:
        return not await self.request.is_disconnected()

    def _take(self, piece: Piece) -> None:
        """Count a piece; raises when it carries an error."""
        if piece.error is not None:
            raise _engine_error(piece.error)
        self.texts[piece.index] += piece.text
        self.tokens += piece.tokens
        if piece.tokens and self.first_token is None:
            self.first_token = time.monotonic()
        if piece.finish_reason is not None:
            self.reasons[piece.index] = piece.finish_reason

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
            choices = list(zip(self.texts, [_public(reason) for reason in self.reasons], strict=True))
            counts = protocol.usage(len(self.prompt_ids), self.tokens)
            return JSONResponse(
                protocol.completion(self.id, self.model.name, self.model.fingerprint, choices, counts)
            )
        finally:
            self._end(outcome)

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events: role first, text as it comes, finish reason, usage if asked, [DONE]."""
        options = self.asked.stream_options
        include = bool(options and options.include_usage)
        chunks = Chunks(self.id, self.model.name, self.model.fingerprint, include)
        outcome, quiet_since = "abort", time.monotonic()
        try:
            for index in range(self.asked.n):
                yield _event(chunks.delta(index, {"role": "assistant", "content": ""}))
            while not self.done:
                piece = await self._next()
                if not await self._listens():
                    return
                if piece is None:
                    if time.monotonic() - quiet_since > PING_SECONDS:
                        quiet_since = time.monotonic()
                        yield b": ping\n\n"
                    continue
                self._take(piece)
                quiet_since = time.monotonic()
                if piece.text:
                    yield _event(chunks.delta(piece.index, {"content": piece.text}))
                if piece.finish_reason is not None:
                    yield _event(chunks.delta(piece.index, {}, _public(piece.finish_reason)))
            self._remember()
            outcome = ",".join(str(reason) for reason in self.reasons)
            if include:
                yield _event(chunks.usage(protocol.usage(len(self.prompt_ids), self.tokens)))
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
                self.feedback.remember(
                    Answer(
                        id=answer_id(self.id, index),
                        prompt=tuple(self.messages),
                        text=text,
                        model=self.model.name,
                        weights=self.model.weights,
                        finish_reason=reason,
                    )
                )

    def _end(self, outcome: str) -> None:
        if self.ticket is not None and not self.done:
            self.ticket.cancel()
        now = time.monotonic()
        log.info(
            "%s model=%s in=%d out=%d first=%.3fs total=%.3fs end=%s",
            self.id,
            self.model.name,
            len(self.prompt_ids),
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


def _engine_error(problem: Exception) -> ApiError:
    """A deterministic failure must be a 4xx: clients repeat a 5xx."""
    if isinstance(problem, TimeoutError):
        return ApiError(503, str(problem), type="unavailable_error", headers={"Retry-After": "5"})
    if isinstance(problem, (UserError, ValueError)):
        return ApiError(400, str(problem))
    return ApiError(500, "the engine failed on this request; the server goes on", type="server_error")


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
