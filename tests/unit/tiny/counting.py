"""Count letters, one line per step, with checkpoints: the smallest stage that can be interrupted.

The environment says when to die, fail or wait; it stands for the accidents of a real run.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from caravan.stage import Runtime, rank
from caravan.store import Artefact

INPUTS = {"raw": "raw", "extra": "raw|corpus?"}
OUTPUT = "corpus"
USES: dict[str, str] = {}
VERSION = 1
RANKS = "COUNTING_TOGETHER" in os.environ


@dataclass(frozen=True, kw_only=True)
class Smooth:
    alpha: float = 0.5
    """Added to each count."""
    kind: Literal["add", "none"] = "add"
    """How counts are smoothed."""


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 20
    """Lines to read."""
    smooth: Smooth = Smooth(alpha=0.25)
    words: tuple[str, ...] = ()
    """Words to leave out."""
    upper: bool = False
    """Whether to count capitals apart."""
    limit: int | None = None
    """Letters to keep at most; none keeps all."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    assert not list(out.iterdir()), "out must be empty at the start"
    lines = (inputs["raw"] / sorted(inputs["raw"].manifest["files"])[0]).read_text().splitlines()
    saved = rt.work / "state.json"
    state = json.loads(saved.read_text()) if saved.exists() else {"step": 0, "counts": {}}
    if "COUNTING_LOG" in os.environ:
        with open(os.environ["COUNTING_LOG"], "a") as log:
            log.write(f"from {state['step']}\n")
    (out / "leftover").write_text("of an attempt cut short")
    work = rt.work if rank() == 0 else out  # one writes what all share
    with (work / "metrics.jsonl").open("w") as metrics:
        for step in range(state["step"], cfg.steps):
            for letter in lines[step % len(lines)]:
                state["counts"][letter] = state["counts"].get(letter, 0) + 1
            state["step"] = step + 1
            rt.report(step + 1, cfg.steps, "lines", letters=len(state["counts"]))
            if (step + 1) % 5 == 0 and rank() == 0:
                saved.with_suffix(".new").write_text(json.dumps(state))
                os.replace(saved.with_suffix(".new"), saved)
            if str(step + 1) == os.environ.get("COUNTING_DIES_AT"):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(float(os.environ.get("COUNTING_SLEEPS", "0")))
        metrics.write(
            json.dumps({"step": cfg.steps, "loss": 1.5, "seconds": time.time(), "lines_per_second": 3}) + "\n"
        )
    if os.environ.get("COUNTING_FAILS") == "full":
        raise OSError(errno.ENOSPC, "No space left on device", str(out / "counts.json"))
    if os.environ.get("COUNTING_FAILS") == "interrupted":
        raise KeyboardInterrupt
    if os.environ.get("COUNTING_FAILS") == "bug":
        raise KeyError("an honest mistake")
    (out / "leftover").unlink()
    (work / "timing.jsonl").write_text(json.dumps({"now": time.time()}) + "\n")
    (out / "counts.json").write_text(json.dumps(state["counts"], sort_keys=True))
    return {"letters": len(state["counts"]), "alpha": cfg.smooth.alpha}
