"""The part of a benchmark that is the same whoever runs: contenders in processes of their own, one after
another, round after round, so that a busy minute hits all alike; the best round of each counts."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Result = dict[str, Any]
"""Of one contender: `rate` (more is better), `unit`, and whatever else is worth keeping."""


def peak_rss_mb() -> float:
    """Most memory this process ever held. `ru_maxrss` begins with what its parent held when it started it."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Clock:
    """Marks at the end of each step; the first step (warm-up, lazy initialisation) is not timed."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def tick(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.perf_counter())

    def result(self, per_step: float, unit: str, **more: Any) -> Result:
        """`per_step` units of work a step, `unit` of the rate."""
        seconds = self.marks[-1] - self.marks[0]
        steps = len(self.marks) - 1
        peak = peak_rss_mb()
        rate = per_step * steps / seconds
        return {"rate": rate, "unit": unit, "seconds_per_step": seconds / steps, "peak_rss_mb": peak, **more}

    def callback(self) -> Any:
        """For a `transformers` Trainer."""
        from transformers import TrainerCallback

        class Tick(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock.tick()

        clock = self
        return Tick()


def run_stage(
    name: str, config: Any, folder: Path, roles: dict[str, str], threads: int
) -> tuple[Clock, list[dict[str, Any]]]:
    """Our stage as it is, its own loader, checkpoints and journal included, on the artefacts `folder`/kind;
    also its timing journal, a line per step."""
    from caravan.stage import Runtime
    from caravan.store import Artefact

    clock = Clock()
    inputs = {r: Artefact(folder / kind, {"kind": kind, "id": "0" * 16}) for r, kind in roles.items()}
    with tempfile.TemporaryDirectory() as work:
        rt = Runtime(work=Path(work), device="cpu", threads=threads, report=clock.tick)
        (Path(work) / "out").mkdir()
        importlib.import_module(f"caravan.stages.{name}").run(config, inputs, Path(work) / "out", rt)
        timing = [json.loads(line) for line in (Path(work) / "timing.jsonl").read_text().splitlines()]
    return clock, timing


def stdlib_texts(count: int = 60) -> list[str]:
    """Source files of the standard library: real text that every machine has."""
    import sysconfig

    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:count]
    return [path.read_text(encoding="utf-8", errors="replace") for path in files]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines, the folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What `write_rows` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def main(
    script: str,
    doc: str,
    contenders: dict[str, list[str]],
    write_inputs: Callable[[Path], None],
    contend: Callable[[str, str, Path, int, int], Result],
    about: Callable[[int], dict[str, Any]] = lambda threads: {},
) -> None:
    """Command line of a race: `contend(what, who, folder, steps, threads)` runs in a child process each time.

    `about(threads)` is measured once, before the race, for the head of the report.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", default=list(contenders), choices=sorted(contenders))
    parser.add_argument("--only", nargs="+", help="contenders to run")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.child:
        import torch

        what, who, folder = args.child
        torch.set_num_threads(args.threads)
        print("RESULT " + json.dumps(contend(what, who, Path(folder), args.steps, args.threads)))
        return
    from caravan import provenance

    report: dict[str, Any] = {
        "machine": provenance.machine(), "threads": args.threads, "versions": provenance.libraries(),
        "steps": args.steps, "rounds": args.rounds, "load_before": os.getloadavg(), **about(args.threads),
        "results": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        write_inputs(Path(temporary))
        for what in args.what:
            chosen = [who for who in contenders[what] if not args.only or who in args.only]
            report["results"][what] = _race(script, what, chosen, Path(temporary), args)
    text = json.dumps(report, indent=1)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)


def _race(script: str, what: str, chosen: list[str], folder: Path, args: argparse.Namespace) -> Result:
    best: dict[str, Any] = {}
    for _ in range(args.rounds):
        for who in chosen:
            one = _child(script, what, who, folder, args)
            if "error" in one:
                best.setdefault(who, one)
                continue
            print(f"{what} {who}: {one['rate']:.4g} {one['unit']}", file=sys.stderr)
            before = best.get(who, {})
            rates = [*before.get("all_rates", []), one["rate"]]
            best[who] = {**(one if one["rate"] > before.get("rate", 0.0) else before), "all_rates": rates}
    ours = best.get("ours", {}).get("rate", 0.0)
    ratios = {who: round(ours / one["rate"], 3) for who, one in best.items() if "rate" in one}
    return {"contenders": best, "ours_over": ratios}


def _child(script: str, what: str, who: str, folder: Path, args: argparse.Namespace) -> Result:
    command = [sys.executable, script, "--steps", str(args.steps), "--threads", str(args.threads)]
    # glibc hands freed arrays back to the system after every step otherwise; all contenders get the same.
    keep = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_MAX_": "0"}
    env = {**os.environ, **keep, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(
        [*command, "--child", what, who, str(folder)], env=env, capture_output=True, text=True, check=False
    )
    found = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        print(f"{what} {who} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return {"error": done.stderr.strip().splitlines()[-3:]}
    result: Result = json.loads(found[-1])
    return result
