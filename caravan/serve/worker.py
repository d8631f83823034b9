"""One thread owns the engine. Everybody else puts jobs into a bounded queue and is handed pieces of text.

    submit() -> Ticket          any thread; QueueFull when the queue is full, Draining when we are closing
    deliver(Piece)              called on the engine's thread, once per step and choice: must not block
    Ticket.cancel()             any thread; the engine drops the request, and frees its blocks, before its
    next step

A request that raises takes only itself down: an exception while submitting ends that job; an exception in a
step ends the jobs in flight (nobody can know whose fault it was) and the thread goes on with the next ones.
"""

from __future__ import annotations

import codecs
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from caravan.types import Sampling

log = logging.getLogger("caravan.serve")


class EngineLike(Protocol):
    """What the worker needs of an engine (see caravan.engine.engine.Engine)."""

    def submit(self, prompt_ids: list[int], sampling: Sampling) -> Any: ...

    def step(self) -> Sequence[Any]: ...

    def abort(self, id: Any) -> Any: ...


class QueueFull(Exception):
    """Too many requests wait; try again after `retry_after` seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests are waiting; try again in about {retry_after} s")
        self.retry_after = retry_after


class Draining(Exception):
    """The server is closing and takes no new requests."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step gave to one choice."""

    index: int
    """Which of the n choices."""
    text: str = ""
    """New text, complete UTF-8, never part of a stop text."""
    tokens: int = 0
    """New tokens, those without text (stop token, half a character) included."""
    finish_reason: str | None = None
    """stop | length | abort, or None while it goes on."""
    error: Exception | None = None
    """Why the choice ended without an answer."""


class TextStream:
    """Token ids in, text out: half characters and possible beginnings of stop texts are held back.

    `piece(id)` gives the bytes of a token (b"" for special ones). Bytes that can never become UTF-8 turn into
    U+FFFD.
    """

    def __init__(self, piece: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        self._piece = piece
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, ids: Sequence[int]) -> tuple[str, bool]:
        """Text that is safe to show now, and whether a stop text appeared (the text ends before it)."""
        return self._cut(self._decoder.decode(b"".join(self._piece(id) for id in ids)))

    def flush(self) -> tuple[str, bool]:
        """What was held back, at the end of the generation."""
        text, stopped = self._cut(self._decoder.decode(b"", final=True))
        if not stopped:
            text, self._held = text + self._held, ""
        return text, stopped

    def _cut(self, new: str) -> tuple[str, bool]:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((k for k in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:k])), 0)


@dataclass(slots=True, eq=False)
class _Job:
    prompt_ids: list[int]
    sampling: Sampling
    index: int
    deliver: Callable[[Piece], None]
    stream: TextStream
    deadline: float
    cancelled: bool = False
    engine_id: Any = None
    started: float = 0.0


@dataclass(slots=True)
class Ticket:
    """One admitted request of n choices."""

    _worker: Worker
    _jobs: list[_Job] = field(default_factory=list)

    def cancel(self) -> None:
        """Stop generating; harmless when already finished."""
        self._worker._cancel(self._jobs)


class Worker:
    """Runs one engine on its own thread.

    max_running: choices in the engine at once. max_queued: choices that may wait. deadline_seconds: queue and
    generation together; a choice still waiting then fails, one already running ends with finish reason
    "length".
    """

    def __init__(
        self,
        engine: EngineLike,
        piece: Callable[[int], bytes],
        *,
        max_running: int = 16,
        max_queued: int = 64,
        deadline_seconds: float = 600.0,
        name: str = "engine",
    ) -> None:
        self._engine = engine
        self._piece = piece
        self.max_running = max_running
        self.max_queued = max_queued
        self.deadline_seconds = deadline_seconds
        self._wake = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._running: dict[Any, _Job] = {}
        self._draining = False
        self._closing = False
        self._seconds_per_job = 2.0
        self._thread = threading.Thread(target=self._loop, name=f"caravan-{name}", daemon=True)
        self._thread.start()

    # ---- any thread ----

    def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, deliver: Callable[[Piece], None], n: int = 1
    ) -> Ticket:
        """Admit one request of n choices, or raise QueueFull or Draining. Choice i draws with seed + i."""
        deadline = time.monotonic() + self.deadline_seconds
        jobs = [
            _Job(
                prompt_ids=list(prompt_ids),
                sampling=replace(sampling, seed=sampling.seed + index, stop=()),
                index=index,
                deliver=deliver,
                stream=TextStream(self._piece, sampling.stop),
                deadline=deadline,
            )
            for index in range(n)
        ]
        with self._wake:
            if self._draining or self._closing:
                raise Draining("the server is closing and takes no new requests")
            free = max(self.max_running - len(self._running), 0)
            if len(self._waiting) + n > self.max_queued + free:
                raise QueueFull(self._retry_after())
            self._waiting.extend(jobs)
            self._wake.notify()
        return Ticket(self, jobs)

    def stats(self) -> dict[str, int]:
        """Choices running and waiting now."""
        with self._wake:
            return {"running": len(self._running), "waiting": len(self._waiting)}

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def drain(self) -> None:
        """Take nothing new; what is admitted is finished."""
        with self._wake:
            self._draining = True

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    def close(self, timeout: float = 10.0) -> None:
        """End the thread; what is still in flight ends with finish reason "abort"."""
        with self._wake:
            self._draining = self._closing = True
            self._wake.notify()
        self._thread.join(timeout)

    def _cancel(self, jobs: list[_Job]) -> None:
        with self._wake:
            for job in jobs:
                job.cancelled = True
            self._wake.notify()

    def _retry_after(self) -> int:
        """Seconds until a place is likely free; 120 at most, for clients do not retry at all above that."""
        rounds = (len(self._waiting) + 1) / self.max_running
        return max(1, min(120, math.ceil(rounds * self._seconds_per_job)))

    # ---- the engine's thread ----

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._running or self._closing):
                    self._wake.wait()
                closing = self._closing
                dropped = [job for job in self._waiting if job.cancelled]
                if dropped:
                    self._waiting = deque(job for job in self._waiting if not job.cancelled)
                count = max(self.max_running - len(self._running), 0)
                admitted = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
                # Counted as running from here on, so that nobody sees a place that is already given away.
                self._running.update((("starting", id(job)), job) for job in admitted)
            for job in dropped:
                _deliver(job, Piece(job.index, finish_reason="abort"))
            self._start(admitted)
            if closing:
                self._end_all(None)
                return
            self._abort_cancelled()
            self._step()

    def _start(self, jobs: list[_Job]) -> None:
        now = time.monotonic()
        for job in jobs:
            key: Any = ("starting", id(job))
            error: Exception | None = None
            if now > job.deadline:
                error = TimeoutError("the request waited in the queue until its deadline")
            else:
                try:
                    job.engine_id = self._engine.submit(job.prompt_ids, job.sampling)
                    job.started = now
                except Exception as problem:  # one bad request must not take the others down
                    log.exception("the engine refused a request")
                    error = problem
            with self._wake:
                del self._running[key]
                if error is None:
                    self._running[job.engine_id] = job
            if error is not None:
                _deliver(job, Piece(job.index, finish_reason="abort", error=error))

    def _abort_cancelled(self) -> None:
        now = time.monotonic()
        for job in list(self._running.values()):
            if job.cancelled or now > job.deadline:
                self._abort(job)
                text, _ = job.stream.flush()
                self._finish(
                    job, Piece(job.index, text, finish_reason="abort" if job.cancelled else "length")
                )

    def _step(self) -> None:
        if not self._running:
            return
        try:
            events = self._engine.step()
        except Exception as problem:
            log.exception("a step of the engine failed; the requests in flight end with an error")
            self._end_all(problem)
            return
        for event in events:
            job = self._running.get(event.id)
            if job is not None:
                self._handle(job, list(event.new_ids), event.finish_reason if event.finished else None)

    def _handle(self, job: _Job, ids: list[int], reason: str | None) -> None:
        text, stopped = job.stream.push(ids)
        if stopped:
            if reason is None:
                self._abort(job)
            self._finish(job, Piece(job.index, text, len(ids), "stop"))
        elif reason is not None:
            rest, stopped = job.stream.flush()
            self._finish(job, Piece(job.index, text + rest, len(ids), "stop" if stopped else reason))
        else:
            _deliver(job, Piece(job.index, text, len(ids)))

    def _abort(self, job: _Job) -> None:
        try:
            self._engine.abort(job.engine_id)
        except Exception:  # a broken engine may fail here too; the clients must still be told
            log.exception("abort failed")

    def _finish(self, job: _Job, piece: Piece) -> None:
        with self._wake:
            self._running.pop(job.engine_id, None)
            self._seconds_per_job += 0.2 * (time.monotonic() - job.started - self._seconds_per_job)
        _deliver(job, piece)

    def _end_all(self, error: Exception | None) -> None:
        """Drop everything in flight (and, when closing, what waits)."""
        for job in list(self._running.values()):
            self._abort(job)
            self._finish(job, Piece(job.index, finish_reason="abort", error=error))
        if error is None:
            with self._wake:
                waiting, self._waiting = self._waiting, deque()
            for job in waiting:
                _deliver(job, Piece(job.index, finish_reason="abort"))


def _deliver(job: _Job, piece: Piece) -> None:
    try:
        job.deliver(piece)
    except RuntimeError:  # the event loop of a client that is gone is closed: nobody is left to tell
        job.cancelled = True
