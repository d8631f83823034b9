"""Peak memory of the road from text to shards, of some documents and of ten times as many, under one flag;
prints JSON.

    python bench/memory.py [--documents 30000] [--growth 10] [--memory 2] [--output FILE]

The documents are made up: of ten, one is a copy and one nearly a copy of another. Every stage runs in a
process of its own with one worker; its peak is VmHWM, which counts pages of mapped files. `--memory` is what
the stages that sort are given (megabytes). With fewer documents than signals keeps for its quantiles (20,000)
or writes at once, the first run is still filling what the second one has full.

No stage is timed: this may run on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STAGES = {  # stage -> (role -> made by)
    "corpus": {"raw": "raw"},
    "signals": {"corpus": "corpus"},
    "filter": {"corpus": "corpus", "signals": "signals"},
    "dedup": {"corpus": "filter"},
    "tokenizer": {"corpus": "dedup"},
    "shards": {"corpus": "dedup", "tokenizer": "tokenizer"},
}


def make(folder: Path, count: int) -> None:
    """raw.jsonl: prose of made-up words, and copies."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(5000)]
    last: list[str] = []
    with open(folder / "raw.jsonl", "w", encoding="utf-8") as file:
        for k in range(count):
            text = " ".join(draw.choices(words, k=60)) + ". The end of that and of this."
            if k > 5 and k % 10 in (7, 8):
                text = last[-3] if k % 10 == 7 else last[-5] + " So be it."
            last = [*last[-6:], text]
            file.write(json.dumps({"text": text, "id": f"document-{k:09d}"}) + "\n")


def settings(name: str, memory: int) -> dict[str, Any]:
    from caravan.data import rules, signals

    if name == "corpus":
        return {"memory_mb": memory}
    if name == "dedup":
        return {"memory_mb": memory, "substring": 50, "url": True}
    if name == "signals":
        asked = rules.needed([rule for one in rules.load(("gopher",)) for rule in one.rules])
        return {"families": tuple(signals.families_of(asked))}
    if name == "filter":
        return {"limits": ("gopher_words.at_least=40",)}
    return {"vocab": 400} if name == "tokenizer" else {}


def run(name: str, folder: Path, memory: int) -> None:
    """One stage; the id of what it made goes to FOLDER/STAGE, its peak to stdout."""
    import importlib

    from caravan import stage
    from caravan.stage import Runtime
    from caravan.store import Store

    store = Store(folder / "store")
    module = importlib.import_module(f"caravan.stages.{name}")
    if name != "corpus":
        given = {role: store.open((folder / by).read_text()) for role, by in STAGES[name].items()}
    else:
        given = {"raw": store.add(folder / "raw.jsonl")}
    made = stage.execute(store, name, module.Config(**settings(name, memory)), given, Runtime(threads=1))
    (folder / name).write_text(made.id)
    print(peak())


def peak() -> float:
    """Megabytes this process had at most."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)


def peaks(count: int, memory: int) -> dict[str, float]:
    """Stage -> its peak in megabytes."""
    with tempfile.TemporaryDirectory() as made:
        make(Path(made), count)
        out = {}
        for name in STAGES:
            call = [sys.executable, __file__, "--stage", name, "--folder", made, "--memory", str(memory)]
            ran = subprocess.run(call, capture_output=True, text=True)
            if ran.returncode:
                raise SystemExit(f"{name} of {count} documents failed: {ran.stderr[-2000:]}")
            out[name] = float(ran.stdout.split()[-1])
            print(f"{name} of {count:,} documents: {out[name]} MB", file=sys.stderr)
        return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=30_000)
    parser.add_argument("--growth", type=int, default=10)
    parser.add_argument("--memory", type=int, default=2)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.stage:
        run(args.stage, args.folder, args.memory)
        return
    one, many = (peaks(args.documents * n, args.memory) for n in (1, args.growth))
    out = {
        "documents": args.documents, "growth": args.growth, "memory_mb": args.memory,
        "peak_mb": {name: {"1x": one[name], f"{args.growth}x": many[name]} for name in STAGES},
        "ratio": {name: round(many[name] / one[name], 3) for name in STAGES},
    }  # fmt: skip
    text = json.dumps(out, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
