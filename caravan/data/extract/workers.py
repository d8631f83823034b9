"""Extraction in processes of its own, so that a hostile page can neither hang nor crash a run.

`mapped(jobs)` gives (job, answer) in the order of the jobs. A job whose process ends (time, memory, a crash
in C code) is answered with what was expected instead, and the process is replaced. At most two jobs per
process are held.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from caravan.data.extract import worker

T = TypeVar("T")
SECONDS = 60.0
"""A page or a file that takes longer is given up."""
MEMORY = 4 << 30
"""Address space of a process (bytes)."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to do (`work`: page or file, and its needs), on which bytes; a note for whoever asked."""

    head: dict[str, Any]
    body: bytes = b""
    note: Any = None
    seconds: float = field(default=SECONDS)


class _Process:
    """One worker, started when it is first needed and again when it has died."""

    def __init__(self) -> None:
        self._running: subprocess.Popen[bytes] | None = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._running is None or self._running.poll() is not None:
            root = str(Path(__file__).resolve().parents[3])
            paths = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
            self._running = subprocess.Popen(
                [sys.executable, "-m", worker.__name__, str(MEMORY)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        return self._running

    def ask(self, job: Job) -> dict[str, Any]:
        """The worker's answer; {"expected": ...} if it died over the job."""
        running = self._started()
        assert running.stdin and running.stdout
        answer = None
        with contextlib.suppress(OSError):  # a broken pipe: it died
            worker.send(running.stdin, {**job.head, "seconds": job.seconds}, job.body)  # type: ignore[arg-type]
            answer = worker.receive(running.stdout)  # type: ignore[arg-type]
        if answer is not None:
            return answer[0]
        code = running.wait()
        self.close()
        if code == -signal.SIGALRM:
            return {"expected": f"something that can be read in {job.seconds:g} seconds"}
        return {"expected": f"something that can be read (the extractor ended with {code})"}

    def close(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.kill()
            running.wait()
            for pipe in (running.stdin, running.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]


class _Pool:
    """As many workers as were ever wanted, kept until the program ends: starting one costs half a second."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: list[_Process] = []
        self._free: queue.LifoQueue[_Process] = queue.LifoQueue()
        self._pid = os.getpid()

    def ask(self, job: Job) -> dict[str, Any]:
        if os.getpid() != self._pid:  # forked: the workers are the parent's
            self.__init__()  # type: ignore[misc]
        try:
            process = self._free.get_nowait()
        except queue.Empty:
            with self._lock:
                process = _Process()
                self._all.append(process)
        try:
            return process.ask(job)
        finally:
            self._free.put(process)

    def close(self) -> None:
        if os.getpid() != self._pid:
            return  # a forked child does not end its parent's workers
        while not self._free.empty():
            self._free.get_nowait()
        for process in self._all:
            process.close()
        self._all.clear()


_pool = _Pool()


def close() -> None:
    """End the workers; a later job starts new ones."""
    _pool.close()


atexit.register(close)


def one(job: Job) -> dict[str, Any]:
    """The answer to one job."""
    return _pool.ask(job)


def mapped(items: Iterable[Job | T], count: int) -> Iterator[tuple[Job | T, dict[str, Any]]]:
    """(job, answer) of every job in order, by `count` processes; what is no job passes, with {}."""
    if count <= 1:
        yield from ((item, one(item) if isinstance(item, Job) else {}) for item in items)
        return
    window: deque[tuple[Job | T, Future[dict[str, Any]] | None]] = deque()
    with ThreadPoolExecutor(count) as threads:  # they only wait for pipes

        def oldest() -> tuple[Job | T, dict[str, Any]]:
            item, future = window.popleft()
            return item, future.result() if future else {}

        for item in items:
            window.append((item, threads.submit(one, item) if isinstance(item, Job) else None))
            while len(window) >= 2 * count or (window and window[0][1] is None):
                yield oldest()
        while window:
            yield oldest()
