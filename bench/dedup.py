"""Speed of deduplication, decontamination and PII per second of processor time, ours and datatrove's MinHash,
on the same texts in one run; prints JSON.

    python bench/dedup.py FOLDER [--megabytes 20] [--rounds 3] [--growth 10] [--output FILE]

FOLDER holds .txt or .md files; they are read into memory and cut at paragraph ends into documents of about
4 KB. One thread, one process; `time.process_time`, so that waiting does not count. The best round counts.

minhash     text to signature (112 places), then all links and clusters; GB per hour of one core
datatrove   its MinHash signatures of the same texts (14 x 8, 5-grams, xxhash), with words split by a regular
            expression in place of spaCy, which is several times slower: its best setting
substring   text to tokens, and tokens to verified spans of 50; million tokens per second
growth      peak memory of finding near duplicates and spans in `growth` times the texts under one memory flag
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "bench"))

from signals import documents, seconds  # noqa: E402

MEMORY = 64 << 20


def cluster(texts: list[str], memory: int = MEMORY) -> int:
    """Signatures, links and clusters; how many copies."""
    import numpy as np

    from caravan.data import dedup
    from caravan.data.dedup.units import digest

    with tempfile.TemporaryDirectory() as folder:
        near = dedup.NearDuplicates(Path(folder), dedup.Setting(), memory)
        ranks, links = dedup.Ranks(), dedup.Links(len(texts))
        for at in range(0, len(texts), 256):
            part = texts[at : at + 256]
            near.add(dedup.signatures(part))
            ranks.add([digest(t)[0] for t in part], [len(t) for t in part])
        near.link(ranks, links)
        near.close()
        return int(np.size(links.clusters(ranks)[0]))


class Substring:
    """Two timed halves of the search for spans."""

    def __init__(self, memory: int = MEMORY) -> None:
        self.read = self.find = 0.0
        self.tokens, self.memory = 0, memory

    def __call__(self, texts: Iterator[list[str]]) -> None:
        from caravan.data import dedup
        from caravan.data.dedup import substring, units

        with tempfile.TemporaryDirectory() as folder:
            search, ranks = substring.Spans(Path(folder), 50, self.memory), dedup.Ranks()
            start = time.process_time()
            for batch in texts:
                for part in units.portions(batch):
                    search.add(units.units(part, units.EVERYTHING))
                ranks.add([units.digest(t)[0] for t in batch], [len(t) for t in batch])
            middle = time.process_time()
            search.found(ranks)
            self.read, self.find = middle - start, time.process_time() - middle
            self.tokens = search.tokens
            search.close()


def datatrove(texts: list[str]) -> Callable[[], None]:
    import datatrove.pipeline.dedup.minhash as minhash
    import xxhash
    from datatrove.data import Document
    from datatrove.utils.hashing import HashConfig

    words = re.compile(r"\w+|[^\w\s]")
    config = minhash.MinhashConfig(
        n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=HashConfig(hash_fc="xxhash", precision=64)
    )
    minhash.load_word_tokenizer = lambda _: types.SimpleNamespace(word_tokenize=words.findall)
    step = minhash.MinhashDedupSignature(tempfile.gettempdir(), config)
    step._hash_func = lambda text: xxhash.xxh64_intdigest(text.encode())  # xxhash 4 takes no text

    def work() -> None:
        for text in texts:
            step.get_signature(step.get_shingles(Document(text=text, id="1").text))

    return work


def peak(folder: Path, megabytes: float, copies: int) -> int:
    """Megabytes of memory at most, in a process of its own."""
    code = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/bench']\n"
        "import dedup as bench, resource, itertools; from pathlib import Path\n"
        "texts = bench.documents(Path(sys.argv[2]), float(sys.argv[3]))\n"
        "abc = 'abcdefghijklmnopqrstuvwxyz'\n"
        "turn = lambda n: str.maketrans(abc, abc[n % 26:] + abc[:n % 26])\n"  # the same words in no round
        "more = ([t.translate(turn(n)) for t in texts[a:a + 256]] for n in range(int(sys.argv[4]))"
        " for a in range(0, len(texts), 256))\n"
        "bench.Substring()(more)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    args = [sys.executable, "-c", code, str(ROOT), str(folder), str(megabytes), str(copies)]
    return int(subprocess.run(args, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--growth", type=int, default=10)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    from caravan.data import decontaminate, dedup, pii

    texts = documents(args.folder, args.megabytes)
    size = sum(len(t.encode()) for t in texts) / 1e6
    out: dict[str, Any] = {"documents": len(texts), "megabytes": round(size, 2), "cpu": os.cpu_count()}
    dedup.signatures(texts[:50])  # builds the tables
    signing = size / seconds(lambda: [dedup.signatures(texts)].clear(), args.rounds)
    out["minhash_mb_per_second"] = round(signing, 1)
    out["minhash_gb_per_hour"] = round(signing * 3.6, 1)
    whole = size / seconds(lambda: [cluster(texts)].clear(), args.rounds)
    out["minhash_with_clusters_gb_per_hour"] = round(whole * 3.6, 1)
    spans = [Substring() for _ in range(args.rounds)]
    for one in spans:
        one(texts[at : at + 256] for at in range(0, len(texts), 256))
    best = min(spans, key=lambda s: s.read + s.find)
    out["substring_tokens"] = best.tokens
    out["substring_mtok_per_second"] = {
        "search": round(best.tokens / best.find / 1e6, 2),
        "with_reading": round(best.tokens / (best.read + best.find) / 1e6, 2),
    }
    index = decontaminate.Index()
    for text in texts[:: max(1, len(texts) // 1000)]:
        index.add(" ".join(text[1000:1400].split()[::-1]))  # as many words, and hardly ever there
    index.search(texts[:10])
    out["decontaminate_mb_per_second"] = round(
        size / seconds(lambda: index.search(texts).clear(), args.rounds), 1
    )
    part = texts[: max(1, len(texts) // 10)]
    small = sum(len(t.encode()) for t in part) / 1e6
    looked = seconds(lambda: pii.find_all(part).clear(), args.rounds)
    out["pii_mb_per_second"] = round(small / looked, 2)
    try:
        theirs = small / seconds(datatrove(part), args.rounds)
        out["datatrove_mb_per_second"] = round(theirs, 2)
        out["times_datatrove"] = round(signing / theirs, 1)
    except ImportError as error:
        out["datatrove"] = f"not measured: {error}"
    if args.growth:
        out["peak_mb"] = {f"{n} x": peak(args.folder, min(args.megabytes, 10), n) for n in (1, args.growth)}
    text = json.dumps(out, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
