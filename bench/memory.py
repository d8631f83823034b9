"""Peak memory of every stage of data, of some documents and of ten times as many, under one flag; prints
JSON.

    python bench/memory.py [--documents 30000] [--growth 10] [--memory 2] [--stages NAME ...] [--output FILE]

Documents, conversations and pairs are made up: of ten, one is a copy and one nearly a copy of another, and of
fifty one holds a question of a benchmark, which has the same size whatever the documents' number. Every stage
runs in a process of its own with one worker; its peak is VmHWM, which counts pages of mapped files.
`--memory` is what the stages that sort are given (megabytes). With fewer documents than signals keeps for its
quantiles (20,000) or writes at once, the first run is still filling what the second one has full. `meanings`
is dedup of given embeddings, `mix` a few steps of batches from two shards by turns.

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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STAGES: dict[str, dict[str, str]] = {  # stage -> (role -> the file, or the stage whose artefact it is)
    "corpus": {"raw": "raw.jsonl"},
    "signals": {"corpus": "corpus"},
    "filter": {"corpus": "corpus", "signals": "signals"},
    "dedup": {"corpus": "filter"},
    "meanings": {"corpus": "dedup", "embeddings": "vectors.parquet"},
    "decontaminate": {"corpus": "dedup", "benchmarks": "benchmark.jsonl"},
    "unseen": {"texts": "dedup", "benchmarks": "benchmark.jsonl"},
    "tokenizer": {"corpus": "dedup"},
    "shards": {"corpus": "dedup", "tokenizer": "tokenizer"},
    "mix": {"shards": "shards"},
    "conversations": {"raw": "chats.jsonl", "benchmarks": "benchmark.jsonl"},
    "preferences": {"raw": "pairs.jsonl", "benchmarks": "benchmark.jsonl"},
}
WIDTH = 16
"""Of an embedding."""


def make(folder: Path, count: int) -> None:
    """raw.jsonl, chats.jsonl and pairs.jsonl: prose of made-up words, copies, and questions of
    benchmark.jsonl; vectors.parquet: a row per document."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(5000)]
    items = [" ".join(draw.choices(words, k=20)) for _ in range(2000)]
    with open(folder / "benchmark.jsonl", "w") as file:
        file.writelines(json.dumps({"id": k, "question": text}) + "\n" for k, text in enumerate(items))
    last: list[str] = []
    names = ("raw", "chats", "pairs")
    with ExitStack() as stack:
        raw, chats, pairs = (stack.enter_context(open(folder / f"{name}.jsonl", "w")) for name in names)
        for k in range(count):
            text = " ".join(draw.choices(words, k=60)) + ". The end of that and of this."
            if k % 50 == 11:
                text += f" {items[k // 50 % 500]}."
            if k > 5 and k % 10 in (7, 8):
                text = last[-3] if k % 10 == 7 else last[-5] + " So be it."
            last = [*last[-6:], text]
            asked, answer = text[:100], text[100:]
            raw.write(json.dumps({"text": text, "id": f"document-{k:09d}"}) + "\n")
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            chats.write(json.dumps({"messages": turns}) + "\n")
            row = {"prompt": asked, "chosen": answer, "rejected": answer[:80]}
            pairs.write(json.dumps(row) + "\n")
    vectors(folder / "vectors.parquet", count)


def vectors(path: Path, count: int) -> None:
    """Embeddings of all documents, the last first."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = np.random.default_rng(1)
    schema = pa.schema({"id": pa.string(), "embedding": pa.list_(pa.float32(), WIDTH)})
    with pq.ParquetWriter(path, schema) as file:
        for stop in range(count, 0, -10_000):
            ids = [f"document-{k:09d}" for k in range(stop - 1, max(0, stop - 10_000) - 1, -1)]
            flat = pa.array(draw.normal(size=len(ids) * WIDTH).astype(np.float32))
            rows = pa.FixedSizeListArray.from_arrays(flat, WIDTH)
            file.write_table(pa.table({"id": ids, "embedding": rows}, schema))


def settings(name: str, memory: int) -> dict[str, Any]:
    from caravan.data import rules, signals

    if name == "corpus":
        return {"memory_mb": memory}
    if name in ("conversations", "preferences"):
        return {"memory_mb": memory, "near_duplicates": "drop"}
    if name == "dedup":
        return {"memory_mb": memory, "substring": 50, "url": True}
    if name == "meanings":
        return {"memory_mb": memory, "exact": False, "near": 0, "semantic": 0.9}
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
    given: dict[str, Any] = {
        role: store.add(folder / by) if "." in by else store.open((folder / by).read_text())
        for role, by in STAGES[name].items()
    }
    if name == "mix":
        mix(given["shards"].path)
        print(peak())
        return
    command = "dedup" if name == "meanings" else name
    module = importlib.import_module(f"caravan.stages.{command}")
    made = stage.execute(store, command, module.Config(**settings(name, memory)), given, Runtime(threads=1))
    (folder / name).write_text(made.id)
    print(peak())


def mix(folder: Path, steps: int = 1000, read: int = 20) -> None:
    """Batches of some steps of a run over two sources, and what all of it reads of each."""
    from caravan.data.loader import PretrainLoader
    from caravan.data.mix import Phase
    from caravan.data.shards import Shards

    phases = [Phase(0.8, (3.0, 1.0)), Phase(0.2, (1.0, 4.0))]
    sources = [Shards.open(folder), Shards.open(folder)]
    loader = PretrainLoader(sources, 1024, 128, phases=phases, steps=steps)
    for step in range(0, steps, steps // read):
        loader.micro_batches(step, 1024)
    assert all(loader.tokens_read(steps))


def peak() -> float:
    """Megabytes this process had at most."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)


def peaks(count: int, memory: int, stages: list[str]) -> dict[str, float]:
    """Stage -> its peak in megabytes, of these and what they need."""
    asked = list(stages)
    for name in asked:  # grows on the way
        asked += [by for by in STAGES[name].values() if by in STAGES and by not in asked]
    with tempfile.TemporaryDirectory() as made:
        make(Path(made), count)
        out = {}
        for name in (n for n in STAGES if n in asked):
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
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.stage:
        run(args.stage, args.folder, args.memory)
        return
    one, many = (peaks(args.documents * n, args.memory, args.stages) for n in (1, args.growth))
    out = {
        "documents": args.documents, "growth": args.growth, "memory_mb": args.memory,
        "peak_mb": {name: {"1x": one[name], f"{args.growth}x": many[name]} for name in one},
        "ratio": {name: round(many[name] / one[name], 3) for name in one},
    }  # fmt: skip
    text = json.dumps(out, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
