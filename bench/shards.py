"""Tokenise and write shards, against the tokenizer library's own speed, on the same texts in one run; prints
JSON.

    python bench/shards.py TOKENIZER FOLDER [--megabytes 20] [--rounds 3] [--output FILE]

TOKENIZER is a folder with a tokenizer; FOLDER holds .txt or .md files, cut at paragraph ends into documents
of about 4 KB. One thread, one process, text in RAM; `time.process_time`, so that waiting does not count. The
two take turns, and the best round of each counts.

library   `encode_batch_fast` of all texts in chunks of 4 MB, and the ids as lists: what nobody can do without
ours      `shards.write_blocks` over `shards.Encode`: the same, the end-of-text ids, checks, files and hashes
memory    growth of the peak resident size over 1 x and 10 x the text, streamed from a generator
packing   share of rows of 2,048 tokens that stays empty, by packing, on these documents; and its speed
reading   micro seconds to find the rows of one step of 64, at step 0 and at step 1,000,000,000
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from caravan.data import shards  # noqa: E402
from caravan.data.loader import PretrainLoader  # noqa: E402
from caravan.data.mix import Phase  # noqa: E402
from caravan.data.pack import best_fit, first_fit  # noqa: E402
from caravan.data.rows import pieces_of  # noqa: E402
from caravan.data.tokenizer import Tokenizer  # noqa: E402

ROW = 2048


def documents(folder: Path, megabytes: float) -> list[str]:
    """Texts of about 4 KB, cut at paragraph ends."""
    out: list[str] = []
    size = 0
    for path in sorted([*folder.rglob("*.txt"), *folder.rglob("*.md")]):
        part: list[str] = []
        held = 0
        text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
        for paragraph in text.split("\n\n"):
            part.append(paragraph)
            held += len(paragraph)
            if held > 4000:
                out.append("\n\n".join(part).strip())
                size += len(out[-1].encode())
                part, held = [], 0
                if size > megabytes * 1e6:
                    return out
    return out


def library(backend: Any, texts: list[str]) -> int:
    tokens = 0
    for chunk in shards.text_chunks(texts):
        tokens += sum(len(e.ids) for e in backend.encode_batch_fast(chunk, add_special_tokens=False))
    return tokens


def ours(tokenizer: Path, texts: Iterator[str] | list[str], vocab: int, out: Path) -> None:
    blocks = map(shards.Encode(str(tokenizer)), shards.text_chunks(texts))
    shards.write_blocks(out, {"train": blocks, "heldout": []}, vocab)


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def peak_megabytes(tokenizer: Path, folder: Path, megabytes: float, times: int) -> float:
    """Of a process of its own."""
    call = [sys.executable, __file__, str(tokenizer), str(folder)]
    call += ["--megabytes", str(megabytes), "--stream", str(times)]
    return float(subprocess.run(call, capture_output=True, text=True, check=True).stdout)


def stream(tokenizer: Path, folder: Path, megabytes: float, times: int) -> float:
    texts = documents(folder, megabytes)
    with tempfile.TemporaryDirectory() as out:
        again = (f"{k} {text}" for k in range(times) for text in texts)
        ours(tokenizer, again, Tokenizer.load(tokenizer).vocab_size, Path(out))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def packing(opened: shards.Shards) -> dict[str, Any]:
    _, sizes = pieces_of(opened.ends, ROW)
    start = time.process_time()
    fit = int(best_fit(sizes, ROW).max()) + 1
    took = time.process_time() - start
    start = time.process_time()
    first = len(first_fit(sizes.tolist(), ROW))
    took_first = time.process_time() - start
    rows = {"chunk": -(-len(opened) // ROW), "best_fit": fit, "first_fit": first, "document": len(sizes)}
    return {
        "empty_share": {name: round(1 - len(opened) / (n * ROW), 4) for name, n in rows.items()},
        "best_fit_pieces_per_second": round(len(sizes) / max(took, 1e-9)),
        "first_fit_pieces_per_second": round(len(sizes) / max(took_first, 1e-9)),
    }


def reading(opened: shards.Shards) -> dict[str, float]:
    run = PretrainLoader([opened, opened], 64 * ROW, ROW, phases=[Phase(1.0, (3, 1))], steps=10**10)
    out = {}
    for step in (0, 10**9):
        took = min(seconds(lambda at=step: run.rows_of(64 * at, 64 * at + 64)) for _ in range(20))
        out[f"step_{step}"] = round(took * 1e6, 1)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stream", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.stream:
        print(stream(args.tokenizer, args.folder, args.megabytes, args.stream))
        return
    texts = documents(args.folder, args.megabytes)
    tok = Tokenizer.load(args.tokenizer)
    backend, size = tok._codec._backend, sum(len(t.encode()) for t in texts) / 1e6  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        work = {
            "library": lambda: library(backend, texts),
            "ours": lambda: ours(args.tokenizer, texts, tok.vocab_size, out),
        }
        ours(args.tokenizer, texts[:50], tok.vocab_size, out)  # loads the tokenizer
        best = dict.fromkeys(work, float("inf"))
        for _ in range(args.rounds):
            for name, job in work.items():
                best[name] = min(best[name], seconds(job))
        opened = shards.Shards.open(out)
        tokens = len(opened)
        result: dict[str, Any] = {
            "documents": len(texts), "megabytes": round(size, 2), "tokens": tokens, "cpu": os.cpu_count(),
            "numpy": np.__version__,
        }  # fmt: skip
        for name, took in best.items():
            result[name] = {
                "megabytes_per_second": round(size / took, 3),
                "tokens_per_second": round(tokens / took),
            }
        result["ours_of_library"] = round(best["library"] / best["ours"], 4)
        result["packing"], result["step_microseconds"] = packing(opened), reading(opened)
    one, ten = (peak_megabytes(args.tokenizer, args.folder, min(args.megabytes, 5), n) for n in (1, 10))
    result["peak_rss_mb"] = {"1x": round(one), "10x": round(ten)}
    text = json.dumps(result, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
