"""Chat with a model in the terminal; piped, it answers what stands on stdin.

    caravan chat model/1a2b3c4d5e6f
    echo "12+29=?" | caravan chat ppo

Commands: /reset forgets the conversation, /system TEXT sets the system message (empty clears it), /help,
/quit. Ctrl-C stops the answer being written, Ctrl-D leaves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TextIO

from caravan.types import Message, Sampling, UserError

if TYPE_CHECKING:
    from caravan.stage import Runtime
    from caravan.store import Store

Answer = Callable[[list[Message], Sampling], Iterator[str]]
HELP = "/reset forgets · /system TEXT sets the system message · /quit leaves · Ctrl-C stops an answer"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Whom to talk to, and how it draws its words."""

    model: str
    """The model: an artefact reference, a name, or a Hugging Face folder."""
    system: str = ""
    """System message; empty for none."""
    temperature: float | None = None
    """0 always takes the likeliest token; none for generation_config.json's, else 0.3."""
    top_k: int | None = None
    """Draw among the k likeliest tokens; 0 among all; none for the model's own."""
    top_p: float | None = None
    """Draw among the likeliest tokens with this probability mass; none for the model's own."""
    max_tokens: int = 1024
    """New tokens of an answer at most (tokens)."""
    seed: int = 0
    """The same seed and conversation give the same answer."""
    precision: str = "fp32"
    """Of the weights: fp32, bf16 or auto."""


def main(cfg: Config, store: Store, rt: Runtime) -> int:
    """Talk until /quit or the end of stdin. Exit code 0."""
    from caravan.serve.load import load

    loaded = load(
        store,
        cfg.model,
        rt,
        max_seqs=1,
        max_tokens=cfg.max_tokens,
        temperature=cfg.temperature,
        precision=cfg.precision,
    )
    sampling = replace(
        loaded.defaults,
        seed=cfg.seed,
        top_k=loaded.defaults.top_k if cfg.top_k is None else cfg.top_k,
        top_p=loaded.defaults.top_p if cfg.top_p is None else cfg.top_p,
    )
    if not sys.stdin.isatty():
        return once(loaded.answer, sys.stdin.read(), cfg.system, sampling, sys.stdout)
    print(f"{loaded.name}. {HELP}", file=sys.stderr)
    return talk(loaded.answer, cfg.system, sampling, _ask, sys.stdout)


def once(answer: Answer, question: str, system: str, sampling: Sampling, out: TextIO) -> int:
    """One question, one answer: for pipes."""
    if not question.strip():
        raise UserError("stdin was empty", 'pipe a question in: echo "12+29=?" | caravan chat MODEL')
    messages = [*_system(system), Message("user", question.strip())]
    for piece in answer(messages, sampling):
        out.write(plain(piece))
        out.flush()
    out.write("\n")
    return 0


def talk(answer: Answer, system: str, sampling: Sampling, ask: Callable[[], str | None], out: TextIO) -> int:
    """The conversation. `ask` gives the next line, None at the end."""
    turns: list[Message] = []
    while (line := ask()) is not None:
        text = line.strip()
        word, _, rest = text.partition(" ")
        if not text:
            continue
        if word in ("/quit", "/exit"):
            break
        if word == "/reset":
            turns.clear()
            _say("forgotten")
        elif word == "/system":
            system = rest.strip()
            _say("system message set" if system else "no system message")
        elif word.startswith("/") and word[1:].isalpha():
            _say(HELP)
        else:
            turns.append(Message("user", text))
            said = _stream(answer([*_system(system), *turns], sampling), out)
            if said is None:
                turns.pop()
            else:
                turns.append(Message("assistant", said))
    return 0


def _stream(pieces: Iterator[str], out: TextIO) -> str | None:
    """Write the pieces as they come. Ctrl-C keeps what was written; None when there was no answer at all."""
    said = ""
    try:
        for piece in pieces:
            said += piece
            out.write(plain(piece))
            out.flush()
    except KeyboardInterrupt:
        close = getattr(pieces, "close", None)
        if close:
            close()
        _say(" (stopped)")
    except UserError as problem:
        _say(f"{problem} ({problem.hint})" if problem.hint else str(problem))
        return None
    out.write("\n\n")
    out.flush()
    return said or None


def plain(text: str) -> str:
    """Without control characters: a model's escape codes must not drive the reader's terminal."""
    return "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and not 0x7F <= ord(c) <= 0x9F))


def _system(text: str) -> list[Message]:
    return [Message("system", text)] if text else []


def _ask() -> str | None:
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
