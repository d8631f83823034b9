"""Serve models: an OpenAI-shaped API and a chat page, on this machine unless told otherwise.

    caravan serve model/1a2b3c4d5e6f
    caravan serve ppo --more sft base --port 8001
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
         -d '{"messages": [{"role": "user", "content": "12+29=?"}]}'

The address goes to stdout once the door is open. SIGTERM and Ctrl-C drain: nothing new is taken, what is
being written is finished within `drain_seconds`.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from caravan.types import UserError

if TYPE_CHECKING:
    from caravan.serve.feedback import FeedbackStore
    from caravan.serve.turn import ServedModel
    from caravan.stage import Runtime
    from caravan.store import Store

KEY_VARIABLE = "CARAVAN_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is served, where, and to whom."""

    model: str
    """The model: an artefact reference, a name, or a Hugging Face folder."""
    more: tuple[str, ...] = ()
    """Further models for the page's picker, as REF or NAME=REF."""
    name: str = ""
    """What the API calls the first model; empty for its own name."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than loopback needs an API key."""
    port: int = 8000
    """Port to listen on; 0 takes any free one."""
    api_key_file: str = ""
    """File with one API key per line. The variable CARAVAN_API_KEY gives one, too."""
    insecure: bool = False
    """Listen beyond loopback without a key: everybody who reaches the port may use the machine."""
    feedback: str = ""
    """Where thumbs and choices are kept: an SQLAlchemy URL, `off`, or empty for feedback.db in the store."""
    temperature: float | None = None
    """Of requests that name none; none for generation_config.json's, else 0.3."""
    max_tokens: int = 1024
    """New tokens of an answer at most, whatever a request asks for (tokens)."""
    max_seqs: int = 16
    """Answers computed at once, per model."""
    max_queued: int = 64
    """Answers that may wait, per model; beyond that requests get 429 with Retry-After."""
    deadline_seconds: float = 600.0
    """Queue and answer together at most (seconds)."""
    drain_seconds: int = 20
    """How long a stopping server lets answers finish (seconds)."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Of the weights while answering; in fp32 an answer depends least on who else is being answered."""
    examples: tuple[str, ...] = ()
    """Questions the chat page offers; none for its own three."""


def main(cfg: Config, store: Store, rt: Runtime) -> int:
    """Serve until told to stop. Exit code 0."""
    keys = api_keys(cfg)
    check_door(cfg, keys)
    door = open_door(cfg.host, cfg.port)
    try:
        feedback = open_feedback(cfg.feedback, store)
        models = load_models(cfg, store, rt)
        serve(cfg, models, feedback, keys, door)
    finally:
        door.close()
    return 0


def load_models(cfg: Config, store: Store, rt: Runtime) -> dict[str, ServedModel]:
    """Every model of the config behind a worker of its own."""
    from caravan.serve.load import load
    from caravan.serve.turn import ServedModel
    from caravan.serve.worker import Worker

    wanted = [(cfg.name, cfg.model)]
    for text in cfg.more:
        name, equals, ref = text.partition("=")
        wanted.append((name, ref) if equals else ("", text))
    models: dict[str, ServedModel] = {}
    for name, ref in wanted:
        loaded = load(
            store,
            ref,
            rt,
            name=name,
            max_seqs=cfg.max_seqs,
            max_tokens=cfg.max_tokens,
            temperature=cfg.temperature,
            precision=cfg.precision,
        )
        if loaded.name in models:
            raise UserError(f"two models are called {loaded.name!r}", "tell them apart: --more NAME=REF")
        worker = Worker(
            loaded.engine,
            max_running=cfg.max_seqs,
            max_queued=cfg.max_queued,
            deadline_seconds=cfg.deadline_seconds,
            name=loaded.name,
        )
        models[loaded.name] = ServedModel(
            name=loaded.name,
            worker=worker,
            render=loaded.prompt,
            calls=loaded.calls,
            encode=loaded.encode,
            context_length=loaded.context_length,
            weights=loaded.weights,
            defaults=loaded.defaults,
        )
        print(f"loaded {loaded.name} (weights {loaded.weights[:12]})", file=sys.stderr)
    return models


def serve(
    cfg: Config,
    models: dict[str, ServedModel],
    feedback: FeedbackStore | None,
    keys: list[str],
    door: socket.socket,
) -> None:
    """Run the server on an open socket until a signal ends it."""
    import uvicorn

    from caravan.serve.api import create_app
    from caravan.serve.guard import LOOPBACK_NAMES

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    hosts = {*LOOPBACK_NAMES, cfg.host} if is_loopback(cfg.host) else None
    app = create_app(models, feedback, keys, hosts=hosts, examples=cfg.examples)
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # one line per request of our own, without addresses and paths
        server_header=False,
        timeout_graceful_shutdown=cfg.drain_seconds,
        lifespan="on",
    )

    class Server(uvicorn.Server):
        """Refuses new requests as soon as it is told to stop."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            for model in models.values():
                model.worker.drain()
            super().handle_exit(sig, frame)

    print(address(cfg.host, door.getsockname()[1]), flush=True)
    print("chat with it there; Ctrl-C stops it", file=sys.stderr)
    try:
        Server(settings).run(sockets=[door])
    except KeyboardInterrupt:  # uvicorn raises the signal again once it has drained
        print("stopped", file=sys.stderr)
    finally:
        for model in models.values():
            model.worker.close()
        if feedback is not None:
            feedback.close()


def open_feedback(url: str, store: Store) -> FeedbackStore | None:
    """The feedback store a config names; None when it is off."""
    from caravan.serve.feedback import FeedbackStore

    if url.strip().lower() in ("off", "none"):
        return None
    if not url:
        store.root.mkdir(parents=True, exist_ok=True)
    return FeedbackStore(url or default_url(store.root))


def default_url(root: Path) -> str:
    """SQLite beside the artefacts."""
    return f"sqlite:///{root / 'feedback.db'}"


def api_keys(cfg: Config) -> list[str]:
    """Keys of the file and of the environment; never a flag's value, which every `ps` would show."""
    keys = [os.environ.get(KEY_VARIABLE, "").strip()]
    if cfg.api_key_file:
        try:
            keys += [line.strip() for line in Path(cfg.api_key_file).expanduser().read_text().splitlines()]
        except OSError as problem:
            raise UserError(f"the key file cannot be read: {problem.strerror}", cfg.api_key_file) from problem
        if not any(keys):
            raise UserError(f"{cfg.api_key_file} holds no key", "write one key per line")
    return [key for key in keys if key]


def check_door(cfg: Config, keys: list[str]) -> None:
    """Refuse to listen to the world without a key."""
    if not is_loopback(cfg.host) and not keys and not cfg.insecure:
        raise UserError(
            f"{cfg.host} can be reached from other machines, and no API key is set",
            f"set {KEY_VARIABLE} or --api-key-file, or accept it with --insecure",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def open_door(host: str, port: int) -> socket.socket:
    """A bound socket, before any weights are read: a taken port is known at once."""
    name = host.strip("[]")
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    door = socket.socket(family, socket.SOCK_STREAM)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((name, port))
    except (OSError, OverflowError) as problem:
        door.close()
        if getattr(problem, "errno", None) == errno.EADDRINUSE:
            raise UserError(
                f"port {port} is taken", f"try --port {port + 1}, or --port 0 for any"
            ) from problem
        raise UserError(f"cannot listen on {host}:{port}: {problem}", "see --host and --port") from problem
    return door


def address(host: str, port: int) -> str:
    """What to type into a browser."""
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host.strip("[]")
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
