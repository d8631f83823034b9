"""Signals per second of processor time, ours and datatrove's filters, on the same texts in one run; prints
JSON.

    python bench/signals.py FOLDER [--megabytes 20] [--rounds 3] [--batch 1048576] [--output FILE]

FOLDER holds .txt or .md files; they are read into memory and cut at paragraph ends into documents of about
4 KB. One thread, one process; `time.process_time`, so that waiting does not count (a busy neighbour still
does, through the caches). The best round counts.

ours        every family of signals (caravan/data/signals), language included
families    each of ours alone, with what it needs of the shared view
filter      a corpus and its signals (Gopher's) read, judged and written again, as `caravan filter` does
datatrove   its Gopher repetition, Gopher quality, C4 and FineWeb filters (the same four groups of rules; pip
            install datatrove), with words split by a regular expression in place of spaCy, which is several
            times slower: its best setting
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def documents(folder: Path, megabytes: float) -> list[str]:
    """Texts of about 4 KB, cut at paragraph ends."""
    out: list[str] = []
    size = 0
    for path in sorted([*folder.rglob("*.txt"), *folder.rglob("*.md")]):
        part: list[str] = []
        held = 0
        for paragraph in (
            path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n").split("\n\n")
        ):
            part.append(paragraph)
            held += len(paragraph)
            if held > 4000:
                out.append("\n\n".join(part).strip())
                size += len(out[-1].encode())
                part, held = [], 0
                if size > megabytes * 1e6:
                    return out
    return out


def batched(texts: list[str], most: int) -> Iterator[list[str]]:
    batch: list[str] = []
    used = 0
    for text in texts:
        batch.append(text)
        used += len(text)
        if used >= most:
            yield batch
            batch, used = [], 0
    if batch:
        yield batch


def seconds(work: Callable[[], None], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def ours(texts: list[str], most: int, families: tuple[str, ...] | None = None) -> Callable[[], None]:
    from caravan.data import signals

    def work() -> None:
        for batch in batched(texts, most):
            signals.compute(signals.View(batch), families)

    return work


def filtering(texts: list[str], most: int, folder: Path) -> Callable[[], None]:
    from caravan.data import measure, records, rules, signals
    from caravan.types import Document

    every = [rule for one in rules.load(("gopher",)) for rule in one.rules]
    needed = rules.needed(every)
    work = measure.Measure(signals.families_of(needed))
    with (
        records.packed_writer(folder / "in.jsonl.zst") as file,
        measure.Writer(folder / "in.parquet") as rows,
    ):
        at = 0
        for batch in batched(texts, most):
            documents = [Document(str(at + k), text, "", "en") for k, text in enumerate(batch)]
            at += len(batch)
            rows.write(work(documents))
            for document in documents:
                file.write(records.dump(document))

    def again() -> None:
        table = measure.Reader(folder / "in.parquet", needed)
        with records.packed_writer(folder / "out.jsonl.zst") as out:
            for batch in measure.document_batches(records.read_documents(folder / "in.jsonl.zst")):
                verdicts = rules.judge(every, table.take(len(batch))).first
                for document, verdict in zip(batch, verdicts, strict=True):
                    out.write(
                        records.dump(document) if verdict is None else records.dump_removed(document, verdict)
                    )

    return again


def datatrove(texts: list[str]) -> Callable[[], None]:
    import datatrove.pipeline.filters.c4_filters as c4
    import datatrove.pipeline.filters.fineweb_quality_filter as fineweb
    import datatrove.pipeline.filters.gopher_quality_filter as quality
    import datatrove.pipeline.filters.gopher_repetition_filter as repetition
    from datatrove.data import Document

    words, ends = re.compile(r"\w+|[^\w\s]"), re.compile(r"(?<=[.!?])\s+")
    for module in (quality, repetition, fineweb):
        module.split_into_words = lambda text, *_: words.findall(text)
    c4.split_into_sentences = lambda text, *_: ends.split(text)
    filters = [
        repetition.GopherRepetitionFilter(), quality.GopherQualityFilter(),
        c4.C4QualityFilter(filter_no_terminal_punct=False), fineweb.FineWebQualityFilter(),
    ]  # fmt: skip

    def work() -> None:
        for text in texts:
            for one in filters:  # each sees every document, as a pass that writes signals would
                one.filter(Document(text=text, id="1"))

    return work


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1 << 20)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    texts = documents(args.folder, args.megabytes)
    size = sum(len(t.encode()) for t in texts) / 1e6
    out: dict[str, Any] = {"documents": len(texts), "megabytes": round(size, 2), "cpu": os.cpu_count()}
    from caravan.data import signals

    ours(texts[:50], args.batch)()  # builds the tables
    out["ours_mb_per_second"] = round(size / seconds(ours(texts, args.batch), args.rounds), 2)
    out["families_mb_per_second"] = {
        name: round(size / seconds(ours(texts, args.batch, (name,)), args.rounds), 1)
        for name in signals.names()
    }
    with tempfile.TemporaryDirectory() as folder:
        judging = filtering(texts, args.batch, Path(folder))
        out["filter_mb_per_second"] = round(size / seconds(judging, args.rounds), 1)
    try:
        part = texts[: max(1, len(texts) // 10)]
        small = sum(len(t.encode()) for t in part) / 1e6
        out["datatrove_mb_per_second"] = round(small / seconds(datatrove(part), args.rounds), 2)
        out["times_datatrove"] = round(out["ours_mb_per_second"] / out["datatrove_mb_per_second"], 1)
    except ImportError as error:
        out["datatrove"] = f"not measured: {error}"
    out["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    text = json.dumps(out, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
