"""Documents in batches through named, pure steps: in one process or in several, with the same answers in
order.

A step looks at a batch and says of each document whether it must go, and why. It may put a new text or what
it found out into the item, nothing else: what it says depends on the documents alone, so that the number of
processes, or another engine, changes nothing. What needs all documents at once (duplicates) comes after, in
one place and in the order of arrival.

    class TooShort:
        name = "length"
        def __call__(self, items: Sequence[Item]) -> list[Rejection | None]: ...

    for outcome in mapped(Steps((Clean(), TooShort())), batches(items), workers=8): ...
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from caravan.data.clean import Rejection
from caravan.types import Document, UserError

A = TypeVar("A")
B = TypeVar("B")
_ATTEMPTS = 3


@dataclass(slots=True)
class Item:
    """A document on its way, with the split its record asks for and what steps found out about it."""

    document: Document
    split: str = ""
    found: dict[str, Any] = field(default_factory=dict)


class Step(Protocol):
    """Something that looks at a batch. A step must survive being sent to another process."""

    name: str

    def __call__(self, items: Sequence[Item]) -> Sequence[Rejection | None]: ...


@dataclass(frozen=True)
class Steps:
    """Steps one after another: batch -> (item, why it goes or None), in the order of the batch."""

    steps: tuple[Step, ...]

    def __call__(self, items: Sequence[Item]) -> list[tuple[Item, Rejection | None]]:
        verdicts: list[Rejection | None] = [None] * len(items)
        left = list(range(len(items)))
        for step in self.steps:
            found = step([items[i] for i in left])
            assert len(found) == len(left), f"{step.name} must say something about every document"
            for i, verdict in zip(left, found, strict=True):
                verdicts[i] = verdict
            left = [i for i in left if verdicts[i] is None]
        return list(zip(items, verdicts, strict=True))


def batches(items: Iterable[A], size: Callable[[A], int], most: int = 1 << 20) -> Iterator[list[A]]:
    """Lists of items whose sizes add up to about `most`; what is in a list depends on the items alone."""
    batch: list[A] = []
    used = 0
    for item in items:
        batch.append(item)
        used += size(item) + 64  # an empty text costs something too
        if used >= most:
            yield batch
            batch, used = [], 0
    if batch:
        yield batch


def item_batches(items: Iterable[Item], most: int = 1 << 20) -> Iterator[list[Item]]:
    """Batches of about a million characters."""
    return batches(items, lambda item: len(item.document.text), most)


def workers(threads: int | None) -> int:
    """Processes to use: what was asked for, else one for every core we may run on."""
    if threads:
        return threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def mapped(work: Callable[[A], B], batches: Iterable[A], workers: int) -> Iterator[B]:
    """work(batch) of every batch, in order, in `workers` processes (1: in this one).

    At most two batches per process are on their way, so memory does not grow with the data. A process that
    dies is replaced and its batches are done again; if that happens three times, UserError.
    """
    batches = iter(batches)
    head = list(itertools.islice(batches, 2))
    if workers <= 1 or len(head) < 2:  # starting processes for one batch would cost more than it
        yield from map(work, itertools.chain(head, batches))
        return
    # A forked worker shares the tables already built, and needs no __main__ that can be imported again.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = _pool(workers, context)
    window: deque[tuple[A, Future[B]]] = deque()
    died = 0
    try:
        for batch in itertools.chain(head, batches):
            window.append((batch, pool.submit(work, batch)))
            while len(window) > 2 * workers:
                done, pool, died = _next(work, window, pool, workers, context, died)
                yield done
        while window:
            done, pool, died = _next(work, window, pool, workers, context, died)
            yield done
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _next(
    work: Callable[[A], B], window: deque[tuple[A, Future[B]]], pool: ProcessPoolExecutor, workers: int,
    context: Any, died: int,
) -> tuple[B, ProcessPoolExecutor, int]:  # fmt: skip
    """The oldest result; should a process have died, everything on its way is sent to a new pool first."""
    while True:
        try:
            result = window[0][1].result()
            window.popleft()
            return result, pool, died
        except BrokenProcessPool as error:
            died += 1
            pool.shutdown(wait=True, cancel_futures=True)
            if died >= _ATTEMPTS:
                raise UserError(
                    f"a worker process died {died} times, perhaps for want of memory",
                    "try fewer with --threads",
                ) from error
            pool = _pool(workers, context)
            for _ in range(len(window)):
                batch, _old = window.popleft()
                window.append((batch, pool.submit(work, batch)))


def _pool(workers: int, context: Any) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, context, initializer=_settle, initargs=(os.getpid(),))


def _settle(parent: int, poll_seconds: float = 1.0) -> None:
    """In a worker: leave Ctrl-C to the parent, and do not outlive it should it be killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_seconds)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
