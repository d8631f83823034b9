"""One thread owns the engine. Everybody else puts jobs into a bounded queue and is handed pieces of text.

    submit() -> Ticket          any thread; QueueFull when the queue is full, Draining when we are closing
    call(run) -> Future         any thread; `run(engine)` between two steps; the same queue and refusals
    deliver(Piece)              called on the engine's thread, once per step and choice: must not block
    Ticket.cancel()             any thread; the engine drops the request, and frees its blocks, before its
    next step

A request that raises takes only itself down: an exception while submitting ends that job; an exception in a
step ends the jobs in flight (nobody can know whose fault it was) and the thread goes on with the next ones.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from caravan.types import Sampling

log = logging.getLogger("caravan.serve")


class EventLike(Protocol):
    """What one step gave to one request; `text` holds whole characters and no stop text."""

    @property
    def id(self) -> int: ...

    @property
    def new_ids(self) -> Sequence[int]: ...

    @property
    def text(self) -> str: ...

    @property
    def finished(self) -> bool: ...

    @property
    def finish_reason(self) -> str | None: ...


class EngineLike(Protocol):
    """What the worker needs of an engine (see caravan.engine.engine.Engine)."""

    def submit(self, prompt_ids: Sequence[int], sampling: Sampling, *, index: int = 0) -> int: ...

    def step(self) -> Sequence[EventLike]: ...

    def abort(self, id: int) -> None: ...

    def stats(self) -> dict[str, int]: ...


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


@dataclass(slots=True, eq=False)
class _Job:
    prompt_ids: list[int]
    sampling: Sampling
    index: int
    deliver: Callable[[Piece], None]
    deadline: float
    queued: float = field(default_factory=time.monotonic)
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

    @property
    def waited(self) -> float | None:
        """Seconds until the engine took the first choice; None while it has taken none."""
        return min((job.started - job.queued for job in self._jobs if job.started), default=None)


class Worker:
    """Runs one engine on its own thread.

    max_running: choices in the engine at once. max_queued: choices that may wait. deadline_seconds: queue and
    generation together; a choice still waiting then fails, one already running ends with finish reason
    "length".
    """

    def __init__(
        self,
        engine: EngineLike,
        *,
        max_running: int = 16,
        max_queued: int = 64,
        deadline_seconds: float = 600.0,
        name: str = "engine",
    ) -> None:
        self._engine = engine
        self.max_running = max_running
        self.max_queued = max_queued
        self.deadline_seconds = deadline_seconds
        self._wake = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._running: dict[Any, _Job] = {}
        self._calls: deque[tuple[Callable[[Any], Any], Future[Any]]] = deque()
        self._draining = False
        self._closing = False
        self._seconds_per_job = 2.0
        self._thread = threading.Thread(target=self._loop, name=f"caravan-{name}", daemon=True)
        self._thread.start()

    # ---- any thread ----

    def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, deliver: Callable[[Piece], None], n: int = 1
    ) -> Ticket:
        """Admit one prompt of n choices, or raise QueueFull or Draining. Choice i draws as index i of the
        seed."""
        return self.submit_all([(prompt_ids, sampling)], deliver, n)

    def submit_all(
        self,
        prompts: Sequence[tuple[Sequence[int], Sampling]],
        deliver: Callable[[Piece], None],
        n: int = 1,
    ) -> Ticket:
        """Admit several prompts of n choices each, all or none. Choice i of prompt k is index k * n + i, in
        its pieces and in its draws."""
        deadline = time.monotonic() + self.deadline_seconds
        jobs = [
            _Job(list(prompt_ids), sampling, k * n + i, deliver, deadline)
            for k, (prompt_ids, sampling) in enumerate(prompts)
            for i in range(n)
        ]
        with self._wake:
            self._check_place(len(jobs))
            self._waiting.extend(jobs)
            self._wake.notify()
        return Ticket(self, jobs)

    def call(self, run: Callable[[Any], Any]) -> Future[Any]:
        """Have `run(engine)` called on the engine's thread between two steps, one call per step, so that
        nobody's answer waits long. Raises QueueFull or Draining; an exception of `run` is the future's."""
        future: Future[Any] = Future()
        with self._wake:
            self._check_place(1)
            self._calls.append((run, future))
            self._wake.notify()
        return future

    def _check_place(self, n: int) -> None:
        if self._draining or self._closing:
            raise Draining("the server is closing and takes no new requests")
        free = max(self.max_running - len(self._running), 0)
        if len(self._waiting) + len(self._calls) + n > self.max_queued + free:
            raise QueueFull(self._retry_after())

    def engine_stats(self) -> dict[str, int]:
        """The engine's own counts (see Engine.stats)."""
        return self._engine.stats()

    def stats(self) -> dict[str, int]:
        """Choices running and waiting now."""
        with self._wake:
            return {"running": len(self._running), "waiting": len(self._waiting) + len(self._calls)}

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
                while not (self._waiting or self._running or self._calls or self._closing):
                    self._wake.wait()
                closing = self._closing
                dropped = [job for job in self._waiting if job.cancelled]
                if dropped:
                    self._waiting = deque(job for job in self._waiting if not job.cancelled)
                count = max(self.max_running - len(self._running), 0)
                admitted = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
                # Counted as running from here on, so that nobody sees a place that is already given away.
                self._running.update((("starting", id(job)), job) for job in admitted)
                call = self._calls.popleft() if self._calls and not closing else None
            for job in dropped:
                _deliver(job, Piece(job.index, finish_reason="abort"))
            self._start(admitted)
            if closing:
                self._end_all(None)
                return
            self._abort_cancelled()
            if call is not None:
                self._answer(*call)
            self._step()

    def _answer(self, run: Callable[[Any], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return  # whoever asked has hung up
        try:
            future.set_result(run(self._engine))
        except Exception as problem:  # the asker is told; the thread goes on
            future.set_exception(problem)

    def _start(self, jobs: list[_Job]) -> None:
        now = time.monotonic()
        for job in jobs:
            key: Any = ("starting", id(job))
            error: Exception | None = None
            if now > job.deadline:
                error = TimeoutError("the request waited in the queue until its deadline")
            else:
                try:
                    job.engine_id = self._engine.submit(job.prompt_ids, job.sampling, index=job.index)
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
                self._finish(job, Piece(job.index, finish_reason="abort" if job.cancelled else "length"))

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
            if job is None:
                continue
            piece = Piece(job.index, event.text, len(event.new_ids), event.finish_reason)
            if event.finished:
                self._finish(job, piece)
            else:
                _deliver(job, piece)

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
                calls, self._calls = self._calls, deque()
            for _, future in calls:
                future.cancel()
            for job in waiting:
                _deliver(job, Piece(job.index, finish_reason="abort"))


def _deliver(job: _Job, piece: Piece) -> None:
    try:
        job.deliver(piece)
    except RuntimeError:  # the event loop of a client that is gone is closed: nobody is left to tell
        job.cancelled = True
