"""Web pages to text: pages per second of processor time and F1 of each engine, beside the libraries.

    python bench/extract.py [--kit KIT] [--gold FOLDER] [--weight 100000] [--links 300] [--output FILE]

Without --gold the pages are our own (tests/pages.py): the kit's declaration of human rights in 19 languages
and its web texts, each in one of five layouts, with scripts, styles and menus as real pages have them. With
--gold they are real ones, in the layout of the article-extraction benchmark (ground-truth.json,
html/NAME.html.gz). F1 is over runs of four words, as that benchmark counts it. One thread, one process;
`time.process_time`; the best round counts.

engines       ours: fast, accurate, plain
trafilatura   the library at its fast setting, precision first; resiliparse: at main content
everything    all the text of the page: the floor for F1
warc          a .warc.gz of the same pages through the reader, with the extractor in a second process (wall
              time), once and ten times as long: pages per second and the highest resident memory
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pages as made  # noqa: E402

Page = tuple[str, str]
"""(HTML, gold)"""


def our_pages(kit: Path, weight: int, links: int) -> list[Page]:
    golds: list[tuple[str, list[str]]] = []
    for path in sorted((kit / "html/udhr").glob("*.html")):
        text = path.read_text(encoding="utf-8")
        said = [
            html.unescape(re.sub("<[^>]+>", " ", p)).strip() for p in re.findall(r"<p>(.*?)</p>", text, re.S)
        ]
        golds.append((re.findall("<h1>(.*?)</h1>", text)[0], said[:25]))
    for line in (kit / "pretrain/web/c4_demo.jsonl").open(encoding="utf-8"):
        said = [p for p in json.loads(line)["text"].split("\n") if p.strip()]
        if sum(map(len, said)) > 400:
            golds.append((said[0][:60], said[:40]))
    return [
        (made.page(t, ps, made.LAYOUTS[i % 5], i, weight, links), "\n".join([t, *ps]))
        for i, (t, ps) in enumerate(golds)
    ]


def gold_pages(folder: Path) -> list[Page]:
    truth = json.loads((folder / "ground-truth.json").read_text(encoding="utf-8"))
    return [
        (
            gzip.decompress((folder / "html" / f"{name}.html.gz").read_bytes()).decode("utf-8", "replace"),
            row["articleBody"],
        )
        for name, row in sorted(truth.items())
    ]


def contenders() -> dict[str, Callable[[str], str]]:
    from resiliparse.extract.html2text import extract_plain_text
    from trafilatura import extract as trafilatura

    from caravan.data.extract import extract

    def ours(engine: str) -> Callable[[str], str]:
        return lambda page: extract(page, engine=engine).text

    return {
        "fast": ours("fast"),
        "accurate": ours("accurate"),
        "plain": ours("plain"),
        "trafilatura": lambda page: (
            trafilatura(page, fast=True, favor_precision=True, include_comments=False) or ""
        ),
        "resiliparse": lambda page: extract_plain_text(page, main_content=True, alt_texts=False),
        "everything": lambda page: extract_plain_text(page),
    }


def measured(work: Callable[[str], str], given: list[Page], rounds: int) -> dict[str, float]:
    found = [work(page) for page, _ in given]
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for page, _ in given:
            work(page)
        times.append(time.process_time() - start)
    size = sum(len(page.encode()) for page, _ in given) / 1e6
    score = made.score([(gold, text) for (_, gold), text in zip(given, found, strict=True)])
    return {
        "pages_per_second": round(len(given) / min(times), 1),
        "mb_per_second": round(size / min(times), 1),
        **{k: round(v, 4) for k, v in score.items()},
    }


READ = """
import resource, sys, time
from pathlib import Path
from caravan.data import formats
from caravan.data.extract import workers
start = time.monotonic()
limits = formats.Limits(html=sys.argv[2])
found = sum(1 for _ in formats.read_all(Path(sys.argv[1]), "corpus", print, limits, {}))
workers.close()
print(found, time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
      resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


def archive(given: list[Page], path: Path, copies: int) -> None:
    with open(path, "wb") as file:
        for n in range(copies):
            for i, (page, _) in enumerate(given):
                block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + page.encode()
                head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a/{n}/{i}\r\n"
                head += f"Content-Length: {len(block)}\r\n\r\n"
                file.write(gzip.compress(head.encode() + block + b"\r\n\r\n", 1))


def through_the_reader(given: list[Page]) -> dict[str, Any]:
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        for copies in (1, 10):
            path = Path(folder, f"x{copies}.warc.gz")
            archive(given, path, copies)
            command = [sys.executable, "-c", READ, str(path), "fast"]
            ran = subprocess.run(
                command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
            )
            count, seconds, reader, worker = ran.stdout.split()[-4:]
            out[f"{copies}x"] = {
                "pages_per_second": round(int(count) / float(seconds), 1),
                "pages": int(count), "reader_peak_mb": int(reader), "extractor_peak_mb": int(worker),
            }  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kit", type=Path, default=ROOT.parent / "shared" / "kit")
    parser.add_argument("--gold", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weight", type=int, default=100_000)
    parser.add_argument("--links", type=int, default=300)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    given = gold_pages(args.gold) if args.gold else our_pages(args.kit, args.weight, args.links)
    out: dict[str, Any] = {
        "pages": len(given), "of": "real pages" if args.gold else "our own pages",
        "kb_per_page": round(sum(len(p.encode()) for p, _ in given) / len(given) / 1e3, 1),
        "cpu": platform.processor() or platform.machine(), "python": platform.python_version(),
    }  # fmt: skip
    for name, work in contenders().items():
        out[name] = measured(work, given, args.rounds)
    out["warc"] = through_the_reader(given)
    out["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    text = json.dumps(out, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
