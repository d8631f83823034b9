"""docs/data/scale.md: what a terabyte of text costs, from bench/results/*.json.

python -m tests.data_cost                the page anew
python -m tests.data_cost --price 0.03   dollars of one core for an hour; the default is what the page assumes
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from caravan.data import dedup

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "data" / "scale.md"
RESULTS = ROOT / "bench" / "results"
PRICE = 0.04
"""Dollars per core-hour: about what the large clouds ask on demand for one core of a general machine."""
TEXT_BYTES = 4000
"""Of a document, for what is counted per document."""
TOKEN_BYTES = 4.4
"""Of a token of English under a vocabulary of 32,000 or more."""
WORD_BYTES = 5.0
"""Of a word or mark, of which `dedup --substring` compares fifty."""
SIGNAL_BYTES = 150
"""Of a document's signals in Parquet."""
PACKED = 0.4
"""Of a corpus packed as .zst at level 3, prose."""
TB = 1e12

Results = dict[str, dict[str, Any]]


def results(folder: Path = RESULTS) -> Results:
    """Benchmark -> what its file says; of several machines the first by name."""
    out: Results = {}
    for path in sorted(folder.glob("*.json")):
        out.setdefault(path.stem.split("-")[0], json.loads(path.read_text()))
    return out


def _substring(r: dict[str, Any]) -> float:
    return float(
        r["substring_mtok_per_second"]["with_reading"] * 1e6 * r["megabytes"] / r["substring_tokens"]
    )


SPEEDS: tuple[tuple[str, str, str, Callable[[dict[str, Any]], float]], ...] = (
    ("extract, `--html plain`", "HTML", "extract", lambda r: r["plain"]["mb_per_second"]),
    ("extract, `--html fast`", "HTML", "extract", lambda r: r["fast"]["mb_per_second"]),
    ("extract, `--html accurate`", "HTML", "extract", lambda r: r["accurate"]["mb_per_second"]),
    ("signals, every family", "text", "signals", lambda r: r["ours_mb_per_second"]),
    ("filter, signals given", "text", "signals", lambda r: r["filter_mb_per_second"]),
    ("dedup, exact and near", "text", "dedup", lambda r: r["minhash_with_clusters_gb_per_hour"] / 3.6),
    ("dedup, copied spans", "text", "dedup", _substring),
    ("decontaminate", "text", "dedup", lambda r: r["decontaminate_mb_per_second"]),
    ("pii", "text", "dedup", lambda r: r["pii_mb_per_second"]),
    ("tokenise and shard", "text", "shards", lambda r: r["ours"]["megabytes_per_second"]),
)
"""(step, of what, benchmark, MB per second of one core in its results)."""


def speed(found: Results, bench: str, of: Callable[[dict[str, Any]], float]) -> float | None:
    """MB per second of one core; None if nobody measured it."""
    try:
        return float(of(found[bench]))
    except KeyError:
        return None


def core_hours(mb_per_second: float) -> float:
    """Of one terabyte."""
    return TB / 1e6 / mb_per_second / 3600


def _costs(found: Results, price: float) -> list[str]:
    out = [
        "| step | of 1 TB of | MB/s per core | core-hours | dollars |",
        "|---|---|---|---|---|",
    ]
    for step, what, bench, of in SPEEDS:
        rate = speed(found, bench, of)
        if rate is None:
            out.append(f"| {step} | {what} | not measured | not measured | not measured |")
            continue
        hours = core_hours(rate)
        out.append(f"| {step} | {what} | {rate:,.1f} | {hours:,.1f} | {hours * price:,.2f} |")
    return out


def _disk() -> list[str]:
    texts = TB / TEXT_BYTES
    setting = dedup.Setting()
    near = 4 * setting.places + 8 * setting.bands
    # digest 16, rank 17, parents and best 16, split 9, id and its end 24
    corpus = texts * (near + 16 + 17 + 16 + 9 + 24)
    kept = texts * (near + 32 + 17 + 16 + 17 + 24)
    # 8 hash, 8 place, 16 while sorting per token; 4 per character
    spans = TB / WORD_BYTES * 32 + TB * 4
    packed = TB * PACKED
    rows = (
        ("corpus", TB + corpus, packed, "the texts unpacked, signatures, keys, ranks"),
        ("signals", 0, texts * SIGNAL_BYTES, "a row of numbers per text, Parquet"),
        ("filter", 0, packed, ""),
        ("dedup", kept, packed, "signatures, keys, ranks, who stays"),
        ("dedup `--substring 50`", kept + spans, packed, "every word's hash and place, every character"),
        ("decontaminate, pii", 0, packed, "each"),
        ("shards, up to 65,536 ids", 0, TB / TOKEN_BYTES * 2 + texts * 8, "uint16"),
        ("shards, more ids", 0, TB / TOKEN_BYTES * 4 + texts * 8, "uint32"),
    )
    out = ["| step | while it runs, TB | left behind, TB | what |", "|---|---|---|---|"]
    return [*out, *(f"| {n} | {w / TB:.2f} | {left / TB:.2f} | {what} |" for n, w, left, what in rows)]


def _memory(found: Results) -> list[str]:
    r = found.get("memory")
    if r is None:
        return ["Not measured: `python bench/memory.py --output bench/results/memory-MACHINE.json`."]
    times = f"{r['growth']}x"
    out = [
        f"`python bench/memory.py`, {r['documents']:,} documents and {r['growth']} times as many, "
        f"`--memory-mb {r['memory_mb']}`, one worker:",
        "",
        f"| stage | peak, MB | peak of {r['growth']} times the text, MB | ratio |",
        "|---|---|---|---|",
    ]
    for name, row in r["peak_mb"].items():
        out.append(f"| {name} | {row['1x']} | {row[times]} | {row[times] / row['1x']:.2f} |")
    return out


TEXT = """\
<!-- written by `python -m tests.data_cost`; change it there -->
# Scale: what a terabyte costs, and where it runs

## Core-hours and dollars per terabyte
One core, {price} dollars for an hour of it (an assumption: what clouds ask on demand; `python -m
tests.data_cost --price` takes yours), speeds as `bench/extract.py`, `signals.py`, `dedup.py` and `shards.py`
measured them (`bench/results`; "not measured" where there is no file yet). Every step that looks at texts one
by one scales with cores; the sorting of `dedup` is in one process. A terabyte is 10^12 bytes of what the
column names, so extraction is per terabyte of HTML, of which a few per cent are left as text. Reading and
writing are not in it except for spans and shards.

{costs}

## Disk per terabyte of text
Counted, not measured: documents of {text_bytes:,} bytes, {token_bytes} bytes per token, text packed to
{packed:.0%} by zstd. What a step leaves is an artefact; `caravan gc` removes those that are needed no more.

{disk}

## Memory
What grows with the number of documents lies in files and is looked at a few megabytes at a time
(`caravan/data/columns.py`): ranks, digests, signatures, the links between copies, held-out draws, ids,
embeddings, what of a benchmark was found where. Sorting holds what `--memory-mb` of `corpus`, `dedup`,
`conversations` and `preferences` says; a single key that very many texts share (a million copies of one page)
is held whole, 56 bytes per text. What else is held depends on settings, not on the corpus: two batches of
about 1 MB per worker (eight on Ray), 20,000 documents' signals for the quantiles, 16,384 rows of signals, the
footer of a million rows of them (some 5 MB).

{memory}

{unbounded}

## One machine or Ray
`corpus`, `signals`, `quality`, `filter`, `dedup`, `decontaminate`, `pii` and `shards` hand batches of about
1 MB to one function (`caravan/data/pool.py`). By default processes of this machine do the work (`--threads`).
With `--engine ray` (`pip install 'caravan-llm[ray]'`) Ray Data does it, on the cluster that `RAY_ADDRESS`
names or on one started here with `--threads` workers. Whoever does it, the bytes that come out are the same
and the artefact has the same id: answers come in the order of the batches, and a worker or node that dies has
its batch done again by another (three times at most). `tests/invariants/test_ray.py` kills a worker of a
cluster of three nodes on the way and compares.

A dataset of Ray Data is given all its input when it begins. A corpus is an iterator of unknown length, so it
goes through as windows of {window} batches per worker, each a dataset of one block per batch with
`preserve_order`. Two windows are on their way at most: while one runs the next is waiting, so that nobody
idles at the end of a window, which also hides the quarter of a second that Ray takes to start a dataset. An
error in the work comes back as itself. What needs all documents at once (links between copies, the split)
stays in the process that was started. Workers must be able to read the run's folder: on several machines, a
shared file system.

## In a datatrove pipeline
`caravan/data/trove.py` (`pip install 'caravan-llm[datatrove]'`) puts our parts into a pipeline of datatrove,
for those who have its executors on Slurm: `Corpus(FOLDER)` reads a corpus artefact, `cleaned()` tidies texts,
`ruled(("gopher",))` applies rule sets, `Stepped((...))` any step of ours.

    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.writers import JsonlWriter
    from caravan.data import trove

    LocalPipelineExecutor(
        [trove.Corpus("corpus-folder"), trove.cleaned(), trove.ruled(("gopher",)), JsonlWriter("out")],
        tasks=8,
    ).run()

`caravan corpus --raw out` reads what it wrote, and `caravan shards --raw` datatrove's token files
([shards](shards.md)).
"""
UNBOUNDED = """What grows with something else: about 150 bytes per run of 13 words of the benchmarks given to
`decontaminate`, `unseen`, `conversations` or `preferences`; half a kilobyte per file read (a million files of
one page each are better one .jsonl); the centres of `dedup --semantic`, with the square root of the texts
([dedup](dedup.md)); 24 bytes per piece of a document for `pretrain --packing best_fit`. Pages of shards that
training has looked at count as its memory until the system wants them back."""


def page(price: float = PRICE, found: Results | None = None) -> str:
    """The whole page."""
    from caravan.data import pool

    found = results() if found is None else found
    return TEXT.format(
        price=price, costs="\n".join(_costs(found, price)), disk="\n".join(_disk()),
        memory="\n".join(_memory(found)), text_bytes=TEXT_BYTES, token_bytes=TOKEN_BYTES, packed=PACKED,
        window=pool._WINDOW, unbounded=UNBOUNDED,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--price", type=float, default=PRICE)
    PAGE.write_text(page(parser.parse_args().price))


if __name__ == "__main__":
    main()
