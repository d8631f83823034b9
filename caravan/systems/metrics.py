"""metrics.jsonl (numbers that a repeated run gives again, bit for bit) and timing.jsonl (what the clock
said).

One JSON object per line, each with its `step`. Opened at a resume, the lines from that step on are dropped,
so the file never holds a step twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Journal:
    """An append-only file of JSON lines, cut back to what lies before `step` when opened."""

    def __init__(self, path: Path, step: int, active: bool = True) -> None:
        self.path, self.active = path, active
        if not active:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read(path) if line["step"] < step]
        part = path.with_suffix(".part")
        part.write_text("".join(_line(line) for line in kept))
        part.replace(path)

    def write(self, **numbers: Any) -> None:
        """Append one line. Numbers that JSON lacks (nan, inf) become strings."""
        if self.active:
            with self.path.open("a") as file:
                file.write(_line(numbers))

    def sync(self) -> None:
        """Flush to the disk; call before a checkpoint that counts on these lines."""
        if self.active and self.path.exists():
            with self.path.open("a") as file:
                os.fsync(file.fileno())


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal; a torn last line (the process died in it) is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def _line(numbers: Mapping[str, Any]) -> str:
    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({name: plain(value) for name, value in numbers.items()}) + "\n"
