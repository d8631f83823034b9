"""C4's rule on three sentences: where they begin, which spans go, and that shards change nothing."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caravan import stage
from caravan.data import lines, records, rewrite
from caravan.data.dedup import sentences, substring
from caravan.data.dedup.keepers import Ranks
from caravan.data.dedup.units import EVERYTHING, joined, portions, units
from caravan.stages import corpus as corpus_stage
from caravan.stages import dedup as dedup_stage
from caravan.store import Store


def split(text: str) -> list[str]:
    return [text[a:b] for a, b in zip(*sentences.spans(text), strict=True)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He said "no." Then he left', ['He said "no."', "Then he left"]),
        ("J. R. Smith came. A. left", ["J. R. Smith came.", "A. left"]),
        ("Plan (J.) is made.", ["Plan (J.)", "is made."]),
        ("A title\nand 3.5 more...\n\nThe end", ["A title", "and 3.5 more...", "The end"]),
        (
            "学而时习之。不亦说乎？“有朋。”自远方来，乐",
            ["学而时习之。", "不亦说乎？", "“有朋。”", "自远方来，乐"],
        ),
        ("", []),
        (" \n ", []),
    ],
)
def test_where_sentences_begin(text: str, parts: list[str]) -> None:
    assert split(text) == parts


PIECES = st.sampled_from(["a", "B", "J.", "no.", 'no."', "yes!", "(so?)", "3.5", "...", "x.)”'", "-", "end"])
LINES = st.lists(st.lists(PIECES, min_size=1, max_size=8).map(" ".join), min_size=1, max_size=4)


@settings(max_examples=100)
@given(LINES)
def test_sentences_are_those_that_c4_counts(rows: list[str]) -> None:
    """A line's sentences as `lines.sentences` counts them, and one more if words are left behind the last."""
    found = [len(split(row)) for row in rows]
    for row, count in zip(rows, found, strict=True):
        last = row.split()[-1]
        ended = re.search("[.!?][\"')\\]”’]{0,3}$", last) and not re.fullmatch(r"[A-Z]\.", last)
        ends = sum(1 for w in row.split() if lines.sentences([w, "x."]) == 2)
        assert count == ends + (not ended)
    assert split("\n".join(rows)) == [part for row in rows for part in split(row)]
    together = units(rows, EVERYTHING)
    assert sentences.begins(rows, together).sum() == sum(found)


def search(
    folder: Path, texts: list[str], memory: int = 1 << 30, batch: int = 1 << 16
) -> set[tuple[int, ...]]:
    one, ranks = substring.Spans(folder, 3, memory), Ranks()
    for part in portions(texts, batch):
        cut = units(part, EVERYTHING)
        one.add(cut, sentences.begins(part, cut))
    ranks.add(np.arange(len(texts)), np.ones(len(texts)))
    found = {(s.place, s.start, s.stop, s.origin, s.origin_start) for s in one.found(ranks)}
    one.close()
    return found


def slow(texts: list[str]) -> set[tuple[int, int]]:
    """(text, sentence) inside a span of three that came before; a span that overlaps its origin spares it."""
    first: dict[tuple[str, ...], tuple[int, int]] = {}
    gone = set()
    for d, text in enumerate(texts):
        parts = ["".join(p.split()) for p in split(text)]
        for i in range(len(parts) - 2):
            d0, i0 = first.setdefault(tuple(parts[i : i + 3]), (d, i))
            if (d0, i0) != (d, i):
                gone |= {(d, t) for t in range(max(i, i0 + 3) if d0 == d else i, i + 3)}
    return gone


@pytest.mark.parametrize(("memory", "batch"), [(1 << 30, 1 << 16), (2000, 50)])
def test_spans_of_three_by_definition(tmp_path: Path, memory: int, batch: int) -> None:
    """Few sentences in many orders, so that spans overlap in every way."""
    draw = random.Random(1)
    stock = ["A cat sat.", "It rained?", "All went  home!", "天下大乱。", "No mark\n"]
    texts = [" ".join(draw.choices(stock, k=draw.randrange(9))) for _ in range(30)]
    found = search(tmp_path, texts, memory, batch)
    assert {(d, t) for d, low, high, _, _ in found for t in range(low, high)} == slow(texts)
    for d, low, high, origin, at in found:
        mine, theirs = split(texts[d])[low:high], split(texts[origin])[at : at + high - low]
        assert ["".join(p.split()) for p in mine] == ["".join(p.split()) for p in theirs]


def test_two_sentences_are_no_span_and_white_space_is_none(tmp_path: Path) -> None:
    base = "One came. Two came. Three came."
    assert search(tmp_path, [base, "One came. Two came. Four came."]) == set()
    assert search(tmp_path, [base, "Zero came. One\tcame.\nTwo came.  Three came. Four."]) == {
        (1, 1, 4, 0, 0)
    }
    assert search(tmp_path, [base, base.replace("Two", "two")]) == set()


def test_a_hash_of_sentences_does_not_depend_on_its_place() -> None:
    hashes = np.arange(1, 9, dtype=np.uint64)
    whole = joined(np.concatenate([hashes, hashes]), np.array([0, 3, 8, 11]))
    assert whole[0] == whole[2] and whole[1] == whole[3] and len(set(whole.tolist())) == 2
    assert joined(hashes[:0], np.zeros(0, np.int64)).tolist() == []


def words(seed: int) -> str:
    draw = random.Random(seed)
    return ". ".join(" ".join(f"w{draw.randrange(10**6)}" for _ in range(5)) for _ in range(9)) + "."


SHARED = "The first of them came early. The second came late! Did the third come at all?"


def rows() -> list[dict[str, str]]:
    out = [{"id": f"d{k:02}", "text": words(k)} for k in range(12)]
    for k in (2, 5, 7):
        out[k]["text"] = f"{words(k)} {SHARED} {words(100 + k)}"
    out[5]["text"] += " " + words(300)  # the longest is ranked best
    out.append({"id": "short", "text": SHARED.replace(". ", ".\n")})
    return out


def test_one_text_keeps_a_span_whatever_the_shards(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    outcomes = []
    for parts, threads in ((1, 1), (4, 2)):
        table = rows()
        random.Random(parts).shuffle(table)
        (tmp_path / f"raw{parts}").mkdir()
        for k in range(parts):
            text = "\n".join(map(json.dumps, table[k::parts]))
            (tmp_path / f"raw{parts}" / f"{k}.jsonl").write_text(text)
        cfg = corpus_stage.Config(near_duplicates=0, repetition=False, heldout_share=0)
        raw = store.add(tmp_path / f"raw{parts}")
        art = stage.execute(store, "corpus", cfg, {"raw": raw})
        cfg = dedup_stage.Config(near=0, sentences=3, memory_mb=1)
        art = stage.execute(store, "dedup", cfg, {"corpus": art}, stage.Runtime(threads=threads))
        kept = {d.id: d.text for _, d in rewrite.read(art.path)}
        spans = sorted(records.read_lines(art / "spans.jsonl.zst"), key=lambda r: r["id"])
        removed = [(r["id"], r["rule"], r["kept"]) for r in records.read_lines(art / "removed.jsonl.zst")]
        outcomes.append((kept, [(r["id"], r["sentences"], r["kept"], r["text"]) for r in spans], removed))
        assert art.facts["spans"]["sentences"] == 9 and art.facts["spans"]["documents"] == 3
        assert art.facts["spans"]["tokens"] == 3 * len(re.findall(r"\w+|[.!?]", SHARED)) == 57
    assert outcomes[0] == outcomes[1]
    kept, spans, removed = outcomes[0]
    assert removed == [("short", "copied_spans", "d05")]
    assert [(a, n, b) for a, n, b, _ in spans] == [("d02", 3, "d05"), ("d07", 3, "d05"), ("short", 3, "d05")]
    assert spans[0][3] == SHARED
    assert kept["d02"] == f"{words(2)} {words(102)}" and SHARED in kept["d05"]
    assert kept["d03"] == words(3)


def test_spans_of_tokens_and_of_sentences_together_lose_nothing(tmp_path: Path) -> None:
    """Every sentence of the corpus is still somewhere."""
    store = Store(tmp_path / "store")
    draw = random.Random(5)
    stock = [f"{words(k).split('.')[0]} {words(900 + k).split('.')[0]}." for k in range(14)]
    texts = []
    for _ in range(14):
        at, size = draw.randrange(9), draw.randrange(3, 6)
        texts.append(" ".join([*draw.sample(stock, 4), *stock[at : at + size]]))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    cfg = corpus_stage.Config(near_duplicates=0, repetition=False, heldout_share=0)
    art = stage.execute(store, "corpus", cfg, {"raw": store.add(tmp_path / "a.jsonl")})
    out = stage.execute(
        store, "dedup", dedup_stage.Config(near=0, substring=15, sentences=3, min_chars=0), {"corpus": art}
    )
    assert out.facts["spans"]["sentences"] > 5 and out.facts["spans"]["tokens"] > 50
    count = [
        sum(len(re.findall(r"\w+|[^\w\s]", d.text)) for _, d in rewrite.read(a.path)) for a in (art, out)
    ]
    removed = records.read_lines(out / "removed.jsonl.zst")
    assert not list(removed) and out.facts["spans"]["tokens"] == count[0] - count[1], "each once, none glued"
    left = "".join("".join(d.text.split()) for _, d in rewrite.read(out.path))
    used = {s for t in texts for s in split(t)}
    assert all("".join(s.split()) in left for s in used)
    assert len(left) < sum(len("".join(t.split())) for t in texts)
