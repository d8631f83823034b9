"""One function over many batches: `mapped(work, batches, workers)`, in order and with the same answers
whoever does the work.

    processes  of this machine: the default
    ray        tasks of a Ray cluster (`pip install caravan-llm[ray]`): the one that RAY_ADDRESS names, else
               one started here

Order is kept and at most two batches per worker are on their way, so memory does not grow with the data and
the bytes that come out are those of one process. A worker that dies is replaced and its batches are done
again.

Left out: shared file systems. Batches travel to the workers and answers back, so a worker needs nothing but
the code, and whatever files `work` itself opens.
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from caravan.types import UserError

A = TypeVar("A")
B = TypeVar("B")
_ATTEMPTS = 3


def workers(threads: int | None) -> int:
    """Processes to use: what was asked for, else one for every core we may run on."""
    if threads:
        return threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def mapped(
    work: Callable[[A], B], batches: Iterable[A], workers: int, engine: str = "processes"
) -> Iterator[B]:
    """work(batch) of every batch, in order, by `workers` processes (1: this one) or Ray tasks.

    At most two batches per worker are on their way, so memory does not grow with the data. A process that
    dies is replaced and its batches are done again; if that happens three times, UserError.
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
    """As tasks of a Ray cluster. Ray itself runs a task again whose worker or node died."""
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
    except ImportError as error:
        raise UserError("--engine ray needs Ray", "pip install 'caravan-llm[ray]'") from error
    mine = not ray.is_initialized()
    if mine:
        address = os.environ.get("RAY_ADDRESS")
        here: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, configure_logging=False, **({} if address else here))
    window: deque[Any] = deque()
    try:
        most = 2 * max(workers, int(ray.cluster_resources().get("CPU", 1)))
        task: Any = ray.remote(num_cpus=1, max_retries=_ATTEMPTS)(_call)
        shared = ray.put(work)  # sent to each node once, not with every batch
        for batch in batches:
            window.append(task.remote(shared, batch))
            if len(window) >= most:
                yield ray.get(window.popleft())
        while window:
            yield ray.get(window.popleft())
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except RayError as error:
        raise UserError(f"the Ray cluster gave up: {error}", "`ray status` shows its nodes") from error
    finally:
        for left in window:
            ray.cancel(left, force=False)
        if mine:
            ray.shutdown()


def _call(work: Callable[[A], B], batch: A) -> B:
    return work(batch)
