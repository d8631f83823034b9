"""One function over many batches: `mapped(work, batches, workers)`, in order and with the same answers
whoever does the work.

    processes  of this machine: the default
    ray        Ray Data on a Ray cluster (`pip install caravan-llm[ray]`): the one that RAY_ADDRESS names,
               else one started here

Order is kept and only a few batches per worker are on their way, so memory does not grow with the data and
the bytes that come out are those of one process. A worker that dies is replaced and its batches are done
again.

Left out: shared file systems. Batches travel to the workers and answers back, so a worker needs nothing but
the code, and whatever files `work` itself opens.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeVar

from caravan.types import UserError

A = TypeVar("A")
B = TypeVar("B")
_ATTEMPTS = 3
_WINDOW = 4
"""Batches per worker in one dataset of Ray Data: starting one takes a quarter of a second."""


def workers(threads: int | None) -> int:
    """Processes to use: what was asked for, else one for every core we may run on."""
    if threads:
        return threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def mapped(
    work: Callable[[A], B], batches: Iterable[A], workers: int, engine: str = "processes"
) -> Iterator[B]:
    """work(batch) of every batch, in order, by `workers` processes (1: this one) or on Ray.

    At most two batches per process (eight per Ray worker) are on their way, so memory does not grow with the
    data. A process that dies is replaced and its batches are done again; if that happens three times,
    UserError.
    """
    if engine == "ray":
        yield from _ray_mapped(work, batches, workers)
        return
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


def _ray_mapped(work: Callable[[A], B], batches: Iterable[A], workers: int) -> Iterator[B]:
    """By Ray Data: windows of batches, each a dataset of one block per batch, in order.

    A dataset of Ray Data begins with all its input, which here is an iterator without end. So it gets a
    window at a time, and while one is worked on the next one waits its turn: two windows are on their way,
    and no worker idles at the end of one. Ray itself runs a block again whose worker or node died.
    """
    try:
        import ray
        import ray.data
        from ray.exceptions import RayError
    except ImportError as error:
        raise UserError("--engine ray needs Ray Data", "pip install 'caravan-llm[ray]'") from error
    mine = not ray.is_initialized()
    if mine:
        address = os.environ.get("RAY_ADDRESS")
        here: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, configure_logging=False, **({} if address else here))
    window: deque[Future[list[Any]]] = deque()
    threads = ThreadPoolExecutor(2)  # they only wait for the cluster
    try:
        most = _WINDOW * max(workers, int(ray.cluster_resources().get("CPU", 1)))
        shared = ray.put(work)  # sent to each node once, not with every batch
        batches = iter(batches)
        while part := list(itertools.islice(batches, most)):
            window.append(threads.submit(_ray_window, _ray_dataset(shared, part)))
            del part  # its blocks are in the object store now
            if len(window) == 2:
                yield from _answers(window.popleft().result())
        while window:
            yield from _answers(window.popleft().result())
    except RayError as error:
        raise UserError(f"the Ray cluster gave up: {error}", "`ray status` shows its nodes") from error
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
        if mine:
            ray.shutdown()


def _ray_dataset(shared: Any, batches: list[Any]) -> Any:
    """A dataset that has not run yet: a block per batch, mapped. What it says of itself is not for people who
    asked for a corpus."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    options = context.execution_options
    before = options.preserve_order, context.enable_progress_bars
    options.preserve_order, context.enable_progress_bars = True, False
    try:  # a dataset takes its settings with it when it is made
        made = ray.data.from_items([{"batch": _Box(b)} for b in batches], override_num_blocks=len(batches))
        return made.map(_RayCall(shared), num_cpus=1, max_retries=_ATTEMPTS)
    finally:
        options.preserve_order, context.enable_progress_bars = before


def _ray_window(dataset: Any) -> list[Any]:
    return [row["answer"] for row in dataset.iter_rows()]


@dataclass(frozen=True, slots=True)
class _Box:
    """Something Ray Data must not make a table of."""

    held: Any


@dataclass(frozen=True)
class _RayCall:
    """A row of one batch -> a row of its answer, or of the error the work raised, which Ray Data would
    bury."""

    shared: Any

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import ray

        try:
            return {"answer": _Box((True, ray.get(self.shared)(row["batch"].held)))}
        except Exception as error:
            return {"answer": _Box((False, error))}


def _answers(boxes: list[Any]) -> Iterator[Any]:
    for box in boxes:
        good, answer = box.held
        if not good:
            raise answer
        yield answer
