"""What is planted into real text, English and Chinese, is found by the stages, and nothing else is taken for
it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from caravan import stage
from caravan.data import records
from caravan.data.dedup.units import EVERYTHING, units
from caravan.stage import Runtime
from caravan.stages import corpus, decontaminate, dedup
from caravan.store import Artefact, Store

SPAN, EACH = 50, 4


def tokens(text: str) -> list[tuple[int, int]]:
    """(start, stop) of each token, as spans are counted."""
    starts, ends = units([text], EVERYTHING).spans(0)
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def sound(kit: Path) -> list[str]:
    """Passages that hold nothing twice: 40 of English books, 40 of Chinese books, 40 web pages."""
    found = []
    for folder, size in (("en_books", 3000), ("zh_books", 900)):
        texts = [p.read_text(encoding="utf-8") for p in sorted((kit / "pretrain" / folder).glob("*"))]
        long = [t.replace("\r\n", "\n") for t in texts if len(t) > 65_000]
        found += [t[at : at + size] for t in long[:10] for at in range(20_000, 60_000, 10_000)]
    lines = (kit / "pretrain/web/c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
    pages = [json.loads(line)["text"] for line in lines]
    return found + [p for p in pages if 1000 < len(p) < 6000][:40]


def questions(kit: Path) -> dict[str, list[str]]:
    """Benchmark file -> questions long enough to be looked for."""
    lines = (kit / "bench/gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
    with open(next((kit / "bench/mmlu/val").glob("*.csv")), encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    gaokao = (kit / "bench/agieval/gaokao-history.jsonl").read_text(encoding="utf-8").splitlines()
    lambada = (kit / "bench/lambada_first_1000.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "gsm8k": [json.loads(line)["question"] for line in lines[40 : 40 + EACH]],
        "mmlu": [row[0] for row in rows if len(row[0].split()) > 15][:EACH],
        "gaokao": [q for q in (json.loads(line)["question"] for line in gaokao) if len(q) > 60][:EACH],
        "lambada": [json.loads(line)["text"] for line in lambada[:EACH]],
    }


def planted(kit: Path) -> dict[str, str]:
    """Name -> text. What ends in `of-NAME` was made from that one; `short` ones hold 49 tokens of it."""
    texts = {f"t{n:03}": text for n, text in enumerate(sound(kit))}
    names, out = list(texts), dict(texts)
    for k in range(EACH):
        for first in (0, 40, 80):  # English books, Chinese books, pages
            one, other, third, host, short = (names[first + 5 * k + n] for n in range(5))
            out[f"copy-of-{one}"] = "\n" + texts[one].replace("\n", " \n")
            middle = len(texts[other]) // 2
            out[f"near-of-{other}"] = texts[other][:middle] + " 改 " + texts[other][middle + 4 :]
            at = tokens(texts[third])
            for target, count, start in ((host, SPAN, 20), (short, SPAN - 1, 20 + SPAN)):
                part = texts[third][at[start][0] : at[start + count - 1][1]]
                into = tokens(texts[target])[30][0]
                out[target] = f"{texts[target][:into]} qvx {part} qvx {texts[target][into:]}"
    hosts = iter(names[20:40])
    for name, asked in questions(kit).items():
        for k, question in enumerate(asked):
            around = out.pop(next(hosts))
            out[f"{name}-{k}"] = f"{around[:1500]}\n{question}\n{around[1500:]}"
    return out


@pytest.fixture(scope="module")
def road(kit: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artefact, Artefact, Artefact]:
    """The corpus, that without copies, and that without benchmarks."""
    folder, texts = tmp_path_factory.mktemp("planted"), planted(kit)
    rows = [json.dumps({"id": name, "text": text}) for name, text in texts.items()]
    (folder / "raw.jsonl").write_text("\n".join(rows))
    store = Store(folder / "store")
    cfg = corpus.Config(near_duplicates=0, repetition=False)
    made = stage.execute(store, "corpus", cfg, {"raw": store.add(folder / "raw.jsonl")}, Runtime(threads=1))
    single = stage.execute(store, "dedup", dedup.Config(substring=SPAN), {"corpus": made}, Runtime(threads=1))
    inputs = {"corpus": single}
    for k, path in enumerate(("gsm8k/train.jsonl", "mmlu/val", "agieval", "lambada_first_1000.jsonl"), 1):
        inputs["benchmarks" + (f".{k}" if k > 1 else "")] = store.add(kit / "bench" / path)
    clean = stage.execute(store, "decontaminate", decontaminate.Config(), inputs, Runtime(threads=1))
    return made, single, clean


def test_planted_copies_are_found_and_nothing_else(
    road: tuple[Artefact, Artefact, Artefact], kit: Path
) -> None:
    removed = [r for art in road[:2] for r in records.read_lines(art / "removed.jsonl.zst")]
    texts = planted(kit)
    for rule, kind in (("exact_duplicate", "copy"), ("near_duplicate", "near")):
        gone = {r["id"] for r in removed if r["rule"] == rule}
        pairs = [{name, name.partition("-of-")[2]} for name in texts if name.startswith(kind)]
        assert len(pairs) == 3 * EACH == len(gone), rule
        assert all(len(gone & pair) == 1 for pair in pairs), rule


def test_planted_spans_are_found_and_one_token_less_is_not(
    road: tuple[Artefact, Artefact, Artefact],
) -> None:
    wanted = set()
    for first in (0, 40, 80):
        for k in range(EACH):
            wanted.add(frozenset(f"t{first + 5 * k + n:03}" for n in (2, 3)))
    spans = list(records.read_lines(road[1] / "spans.jsonl.zst"))
    found = {frozenset((s["id"], s["kept"])) for s in spans}
    assert len(wanted) == 3 * EACH and found == wanted


def test_planted_questions_are_found(road: tuple[Artefact, Artefact, Artefact], kit: Path) -> None:
    clean = road[2]
    removed = {r["id"]: r for r in records.read_lines(clean / "removed.jsonl.zst")}
    wanted = {f"{name}-{k}" for name, asked in questions(kit).items() for k in range(len(asked))}
    assert len(wanted) == 4 * EACH and removed.keys() == wanted
    assert all(r["rule"] == "contaminated" for r in removed.values())
    page = json.loads((clean / "contamination.json").read_text())
    assert {name: row["hit"] for name, row in page.items() if row["hit"]}.keys() >= {
        "lambada_first_1000.jsonl"
    }
    assert sum(row["hit"] for row in page.values()) == 4 * EACH
