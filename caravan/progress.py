"""Progress of one stage, on stderr: a live line on a terminal, elsewhere a plain line now and then.

`report` may be called thousands of times a second: between two redraws it only stores its arguments.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, TextIO

from caravan import stage
from caravan.store import Artefact, Store
from caravan.types import UserError

REDRAW_SECONDS = 0.1
PLAIN_SECONDS = 10.0
_BAR = 24


class Progress:
    """`with Progress("sft") as p` shows what is passed to `p.report`; `p.done(ref, facts)` ends the line."""

    def __init__(self, stage: str, stream: TextIO | None = None, live: bool | None = None) -> None:
        self.stage = stage
        self._stream = stream or sys.stderr
        self._live = _is_terminal(self._stream) if live is None else live
        self._pause = REDRAW_SECONDS if self._live else PLAIN_SECONDS
        self._start = time.monotonic()
        self._due = self._start + (0.0 if self._live else PLAIN_SECONDS)
        self._last: tuple[float, float, str, Mapping[str, Any]] | None = None
        self._marks: deque[tuple[float, float]] = deque(maxlen=200)
        self._screen: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def report(self, done: float, total: float, unit: str, **numbers: Any) -> None:
        """`done` of `total` `unit`s (total 0: unknown), and numbers to show beside the bar."""
        now = time.monotonic()
        self._last = (done, total, unit, numbers)
        if not self._marks or done < self._marks[-1][1]:  # the first report of a resumed run starts the clock
            self._marks.clear()
            self._marks.append((now, done))
        if now < self._due and (done or total):  # words alone ("waiting for ...") are shown at once
            return
        self._due = now + self._pause
        self._marks.append((now, done))
        self._draw(now)

    def done(self, ref: str, facts: Mapping[str, Any] | None = None, stored: bool = False) -> None:
        """End with one line: the reference, a few facts, the time; `stored`: nothing had to be run."""
        self._close()
        took = "from the store" if stored else _span(time.monotonic() - self._start, fine=True)
        words = [f"{self.stage:<13} {ref}", *_numbers(_leading(facts or {})), took]
        tick = "✓" if _can_write(self._stream, "✓") else "ok"
        print(f"{tick} " + "  ".join(words), file=self._stream, flush=True)
        if first := _refused(facts or {}):
            count = (facts or {}).get("quarantined", 0)
            print(f"  {count} put into quarantine.jsonl; first: {first[0]}", file=self._stream, flush=True)

    def line(self) -> str:
        """The state in words, as shown where there is no terminal."""
        if self._last is None:
            return self.stage
        done, total, unit, numbers = self._last
        amount = _amount(done) + (f"/{_amount(total)}" if total else "") if done or total else ""
        parts = [" ".join(filter(None, [f"{self.stage:<13}", amount, unit]))]
        if total:
            parts.append(f"{100 * done / total:3.0f} %")
        speed = self._speed()
        if speed:
            parts.append(f"{_amount(speed)} {unit}/s")
        parts += _numbers(numbers)
        if speed and total > done:
            parts.append(f"{_span((total - done) / speed)} left")
        return "  ".join(parts)

    def _speed(self) -> float:
        if len(self._marks) < 2:
            return 0.0
        (t0, n0), (t1, n1) = self._marks[0], self._marks[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 and n1 > n0 else 0.0

    def _draw(self, now: float) -> None:
        if not self._live:
            print(self.line(), file=self._stream, flush=True)
            return
        if self._screen is None:
            from rich.console import Console
            from rich.live import Live

            # No refresh thread: it would take turns with the training step and does not survive a fork.
            console = Console(file=self._stream)
            self._screen = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False)
            self._screen.start()
        self._screen.update(self._rich(), refresh=True)

    def _rich(self) -> Any:
        from rich.text import Text

        assert self._last is not None
        done, total, unit, numbers = self._last
        text = Text(f"  {self.stage:<13} ", style="bold", no_wrap=True, overflow="ellipsis")
        if total:
            full = round(_BAR * min(1.0, done / total))
            text.append("━" * full, style="cyan").append("━" * (_BAR - full), style="bright_black")
            text.append(f" {_amount(done)}/{_amount(total)} {unit}", style="not bold")
        else:
            text.append(f"{_amount(done)} {unit}" if done else unit, style="not bold")
        speed = self._speed()
        if speed:
            text.append(f"  {_amount(speed)} {unit}/s", style="not bold green")
        for number in _numbers(numbers):
            text.append(f"  {number}", style="not bold")
        if speed and total > done:
            text.append(f"  {_span((total - done) / speed)} left", style="not bold bright_black")
        return text

    def _close(self) -> None:
        if self._screen is not None:
            self._screen.stop()
            self._screen = None


def execute(
    store: Store, name: str, cfg: Any, inputs: Mapping[str, Artefact | None], rt: stage.Runtime | None = None
) -> Artefact:
    """`stage.execute` with its progress shown. An interruption says where the run's checkpoints are.

    With `rt.strict` an answer of the store that was read around malformed lines is a UserError, too.
    """
    if stage.rank() > 0:  # one voice is enough
        return stage.execute(store, name, cfg, inputs, rt)
    question = stage.ask(name, cfg, inputs)
    with Progress(name) as shown:
        if hit := stage.find(store, question):
            if rt and rt.strict and (first := _refused(hit.facts) or hit.facts.get("cut_first")):
                raise UserError(first[0], f"without --strict there is {hit.ref}, made of the rest")
            shown.done(hit.ref, hit.facts, stored=True)
            return hit
        try:
            art = stage.execute(store, name, cfg, inputs, replace(rt or stage.Runtime(), report=shown.report))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{name} keeps its checkpoints in {store.run_folder(name, question.key)};"
            ) from None
        shown.done(art.ref, art.facts)
        return art


def _refused(facts: Mapping[str, Any]) -> list[str]:
    """The first few malformed lines that a stage read around, as file, line and what was expected."""
    return list(facts.get("quarantined_first") or ())


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _can_write(stream: TextIO, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _leading(facts: Mapping[str, Any], most: int = 4) -> dict[str, Any]:
    """The first few plain facts; a stage puts the telling ones first."""
    plain = {k: v for k, v in facts.items() if isinstance(v, int | float | str) and len(str(v)) <= 32}
    return dict(list(plain.items())[:most])


def _numbers(numbers: Mapping[str, Any]) -> list[str]:
    return [f"{name.replace('_', ' ')} {_value(value)}" for name, value in numbers.items()]


def _value(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return _amount(value)
    return f"{value:.3g}" if abs(value) < 0.01 else f"{value:.3f}"


def _amount(value: float) -> str:
    """1234 -> 1,234; 1234567 -> 1.23M."""
    for limit, letter in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= limit:
            return (
                f"{value / limit:.3g}{letter}"
                if abs(value) < 1000 * limit
                else f"{value / limit:,.0f}{letter}"
            )
    return f"{value:,.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.2f}"


def _span(seconds: float, fine: bool = False) -> str:
    """12.3 s; 1:20; 2:03:20."""
    if fine and seconds < 100:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
