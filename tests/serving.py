"""A server on a real socket with a scripted engine behind it, for the tests of the API and of the page."""

from __future__ import annotations

import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from caravan.data.calls import Spelling
from caravan.serve.api import create_app
from caravan.serve.feedback import FeedbackStore
from caravan.serve.turn import ServedModel
from caravan.serve.worker import Worker
from caravan.types import Message, Sampling


@dataclass
class Event:
    """What a scripted engine gives at a step."""

    id: int
    new_ids: tuple[int, ...]
    text: str
    finished: bool
    finish_reason: str | None = None


class ScriptedEngine:
    """Gives the pieces of `script(prompt ids, sampling)` one per step; holds while `gate` is closed."""

    def __init__(self, script: Callable[[list[int], Sampling], list[str]], step_seconds: float = 0.0) -> None:
        self.script = script
        self.step_seconds = step_seconds
        self.live: dict[int, list[str]] = {}
        self.seen: list[tuple[list[int], Sampling, int]] = []
        self.aborted: list[int] = []
        self.embedded: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fail_submit: Exception | None = None
        self.fail_step: Exception | None = None
        self._ids = itertools.count()

    def submit(self, prompt_ids: Any, sampling: Sampling, *, index: int = 0) -> int:
        if self.fail_submit:
            raise self.fail_submit
        self.seen.append((list(prompt_ids), sampling, index))
        id = next(self._ids)
        self.live[id] = self.script(list(prompt_ids), sampling)
        return id

    def step(self) -> list[Event]:
        if not self.gate.wait(0.005):
            return []
        time.sleep(self.step_seconds)
        if self.fail_step:
            problem, self.fail_step = self.fail_step, None
            raise problem
        events = []
        for id, rest in list(self.live.items()):
            piece = rest.pop(0)
            if not rest:
                del self.live[id]
            events.append(Event(id, (7,), piece, not rest, None if rest else "stop"))
        return events

    def abort(self, id: int) -> None:
        if self.live.pop(id, None) is not None:
            self.aborted.append(id)

    def embed(self, prompts: list[list[int]]) -> list[list[float]]:
        self.embedded += prompts
        return [[float(len(ids)), -0.5, 0.25] for ids in prompts]

    def stats(self) -> dict[str, int]:
        return {"blocks": 10, "blocks_owned": 4, "preemptions": 1, "prompt_tokens": 50, "cached_tokens": 32}


class Server:
    """The app on a real socket, in a thread."""

    def __init__(self, app: Any) -> None:
        import uvicorn

        self.door = socket.create_server(("127.0.0.1", 0))
        self.port = self.door.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.door]}, daemon=True)
        self.thread.start()
        until(lambda: self.uvicorn.started)

    def close(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(10)
        self.door.close()


def until(holds: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


WORDS = "one two three"


@dataclass
class House:
    """A server with its engine and feedback, for one test."""

    engine: ScriptedEngine
    worker: Worker
    feedback: FeedbackStore
    server: Server
    http: httpx.Client

    def chat(self, **more: Any) -> httpx.Response:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **more}
        return self.http.post("/v1/chat/completions", json=body)


def houses(serve: Callable[[Any], Server]) -> Iterator[Callable[..., House]]:
    """Gives a maker of Houses; options: running, queued (of the worker), context, calls (how they are spelt),
    seen (filled with what is rendered), and those of create_app."""
    made: list[House] = []

    def make(
        running: int = 4,
        queued: int = 2,
        context: int = 100,
        calls: Spelling | None = None,
        seen: list[list[Message]] | None = None,
        **options: Any,
    ) -> House:
        def render(messages: list[Message]) -> list[int]:
            if seen is not None:
                seen.append(messages)
            return [3] * sum(len(m.content) for m in messages)

        engine = ScriptedEngine(lambda ids, sampling: re.findall(r" ?\S+", WORDS)[: sampling.max_tokens])
        worker = Worker(engine, max_running=running, max_queued=queued)
        feedback = FeedbackStore("sqlite://")
        model = ServedModel(
            name="m",
            worker=worker,
            render=render,
            calls=calls,
            encode=lambda text: [ord(c) for c in text],
            context_length=context,
            weights="abcdef0123456789",
            defaults=Sampling(temperature=0.3, max_tokens=50),
        )
        server = serve(create_app({"m": model}, feedback, **options))
        http = httpx.Client(base_url=server.url, trust_env=False, timeout=10)
        made.append(House(engine, worker, feedback, server, http))
        return made[-1]

    yield make
    for house in made:
        house.engine.gate.set()
        house.http.close()


def chunks(text: str) -> list[Any]:
    data = [line[6:] for line in text.split("\n\n") if line.startswith("data: ")]
    return [part if part == "[DONE]" else json.loads(part) for part in data]
