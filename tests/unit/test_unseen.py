"""Benchmarks against training text, both ways: planted questions, English and Chinese, leave the text by
`decontaminate` and the benchmark by `unseen`; nothing else does."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from caravan import stage
from caravan.data import benchmarks, records, rewrite
from caravan.stages import conversations as conversations_stage
from caravan.stages import corpus as corpus_stage
from caravan.stages import decontaminate as decontaminate_stage
from caravan.stages import unseen as unseen_stage
from caravan.store import Artefact, Store
from caravan.types import UserError

SYLLABLES = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "l")]
HAN = [chr(c) for c in range(0x4E00, 0x4E00 + 500)]


def english(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(SYLLABLES, k=words))


def chinese(seed: int, chars: int) -> str:
    """Without marks."""
    return "".join(random.Random(seed).choices(HAN, k=chars))


def spelt(question: str) -> str:
    """The same words otherwise: capitals, other marks and spaces, full width."""
    if question.isascii():
        return question.upper().replace(" ", ",  ")
    return "，".join(question[k : k + 7] for k in range(0, len(question), 7)) + "？"


ENGLISH = [{"id": f"en{k}", "question": english(100 + k, 25), "answer": "7"} for k in range(6)]
CHINESE = [{"id": f"zh{k}", "question": chinese(200 + k, 30), "answer": "七"} for k in range(6)]
PLANTED = ("en1", "en4", "zh0", "zh3")
HALF = "en5"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Artefact, Artefact]:
    """(store, corpus, benchmarks): four questions stand in documents whole, one in half, twelve words of
    another."""
    folder = tmp_path_factory.mktemp("world")
    texts = [english(k, 220) for k in range(20)] + [chinese(50 + k, 400) for k in range(20)]
    asked = {row["id"]: row["question"] for row in (*ENGLISH, *CHINESE)}
    for place, name in zip((2, 11, 23, 38), PLANTED, strict=True):
        texts[place] += "\n" + spelt(asked[name]) + "\n" + texts[place][:300][::-1]
    texts[7] += " " + " ".join(asked[HALF].split()[:14])
    texts[30] += asked["zh5"][:12]
    rows = [{"id": f"d{k:02}", "text": text} for k, text in enumerate(texts)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "bench").mkdir()
    for name, part in (("english.jsonl", ENGLISH), ("chinese.jsonl", CHINESE)):
        (folder / "bench" / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    store = Store(folder / "store")
    cfg = corpus_stage.Config(near_duplicates=0, repetition=False, heldout_share=0)
    corpus = stage.execute(store, "corpus", cfg, {"raw": store.add(folder / "texts.jsonl")})
    return store, corpus, store.add(folder / "bench")


def unseen(world: Any, threads: int = 1, **settings: Any) -> Artefact:
    store, corpus, bench = world
    inputs = {"benchmarks": bench, "texts": corpus}
    rt = stage.Runtime(threads=threads)
    return stage.execute(store, "unseen", unseen_stage.Config(**settings), inputs, rt)


def ids(art: Artefact) -> list[str]:
    return sorted(item.id for item in benchmarks.read(art.path))


def test_both_ways_find_the_same_planted_questions(world: Any) -> None:
    store, corpus, bench = world
    seen = {*PLANTED, HALF}
    train = stage.execute(
        store, "decontaminate", decontaminate_stage.Config(), {"corpus": corpus, "benchmarks": bench}
    )
    removed = list(records.read_lines(train / "removed.jsonl.zst"))
    assert {item.split()[1] for row in removed for item in row["items"]} == seen
    assert {row["id"] for row in removed} == {"d02", "d07", "d11", "d23", "d38"}
    assert len(list(rewrite.read(train.path))) == 35
    clean = unseen(world)
    everyone = {row["id"] for row in (*ENGLISH, *CHINESE)}
    assert set(ids(clean)) == everyone - seen
    again = stage.execute(store, "unseen", unseen_stage.Config(), {"benchmarks": bench, "texts": train})
    assert set(ids(again)) == everyone, "nothing is left to find in the cleaned text"
    other = stage.execute(
        store, "decontaminate", decontaminate_stage.Config(), {"corpus": corpus, "benchmarks": clean}
    )
    assert other.facts["documents_hit"] == 0, "nor in the text, of the cleaned benchmark"


def test_the_report_says_where_an_item_stood(world: Any) -> None:
    art = unseen(world)
    rows = {row["id"]: row for row in records.read_lines(art / "removed.jsonl.zst")}
    assert rows.keys() == {*PLANTED, HALF}
    assert rows["zh0"]["documents"] == [{"id": "d23", "source": "texts.jsonl", "in": world[1].ref}]
    assert rows["zh0"]["share"] == 1 and rows[HALF]["share"] == 14 / 25
    assert rows["en1"]["source"] == "english.jsonl" and "100%" in rows["en1"]["reason"]
    assert art.facts["benchmarks"] == {
        "chinese.jsonl": {"items": 6, "checked": 6, "hit": 2, "share": 0.333333},
        "english.jsonl": {"items": 6, "checked": 6, "hit": 3, "share": 0.5},
    }
    assert (art.facts["items_in"], art.facts["items_out"]) == (12, 7)
    lines = (art / "english.jsonl").read_text().splitlines()
    assert lines == [json.dumps(row) for row in ENGLISH if row["id"] not in rows], "byte for byte"


def test_settings_and_workers(world: Any) -> None:
    assert unseen(world, threads=2).id == unseen(world).id
    everyone = {row["id"] for row in (*ENGLISH, *CHINESE)}
    assert set(ids(unseen(world, least_share=0.9))) == everyone - {*PLANTED}
    assert set(ids(unseen(world, least_share=0.5))) == everyone - {*PLANTED, HALF}
    assert len(ids(unseen(world, fewest_words=31))) == 12, "none is long enough"


def test_chats_are_training_text_too(world: Any, tmp_path: Path) -> None:
    store, _, bench = world
    turns = [
        {"role": "user", "content": spelt(CHINESE[2]["question"])},
        {"role": "assistant", "content": "七"},
    ]
    others = [
        [{"role": "user", "content": english(k, 30)}, {"role": "assistant", "content": "ok"}]
        for k in range(9)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in (turns, *others)))
    cfg = conversations_stage.Config(heldout_share=0)
    chats = stage.execute(store, "conversations", cfg, {"raw": store.add(tmp_path / "chats.jsonl")})
    inputs = {"benchmarks": bench, "texts": world[1], "texts.2": chats}
    art = stage.execute(store, "unseen", unseen_stage.Config(), inputs)
    rows = {row["id"]: row for row in records.read_lines(art / "removed.jsonl.zst")}
    assert rows.keys() == {*PLANTED, HALF, "zh2"} and rows["zh2"]["documents"][0]["in"] == chats.ref


def test_a_benchmark_that_was_all_seen_is_an_error(world: Any, tmp_path: Path) -> None:
    store, corpus, _ = world
    (tmp_path / "b.jsonl").write_text(json.dumps(ENGLISH[1]))
    with pytest.raises(UserError, match="all 1 items"):
        inputs = {"benchmarks": store.add(tmp_path / "b.jsonl"), "texts": corpus}
        stage.execute(store, "unseen", unseen_stage.Config(), inputs)


def test_files_of_one_name_stay_apart(world: Any, tmp_path: Path) -> None:
    store, corpus, bench = world
    (tmp_path / "english.jsonl").write_text(json.dumps({"id": "x", "question": english(999, 20)}))
    inputs = {"benchmarks": bench, "benchmarks.2": store.add(tmp_path / "english.jsonl"), "texts": corpus}
    art = stage.execute(store, "unseen", unseen_stage.Config(), inputs)
    assert [p.name for p in (art / "2").iterdir()] == ["english.jsonl"] and "x" in ids(art)
    assert len(ids(art)) == 8


def test_every_format_loses_just_the_items_named(tmp_path: Path) -> None:
    rows = [{"id": f"q{k}", "question": f"{english(k, 14)}, “{chinese(k, 3)}”"} for k in range(5)]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    (tmp_path / "d.json").write_text(json.dumps(rows))
    (tmp_path / "e.json").write_text(json.dumps({"v": "1", "easy": rows[:2], "hard": rows[2:]}))
    with open(tmp_path / "f.csv", "w", newline="") as file:
        csv.writer(file).writerows([[row["question"], 'a "b"\nc', row["id"]] for row in rows])
    (tmp_path / "g.txt").write_text("\n".join(row["question"] for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "h.parquet")
    (tmp_path / "i.json").write_text(json.dumps(rows[0]))
    for name, path in benchmarks.files(tmp_path):
        before = list(benchmarks.items(name, path))
        gone = {0} if name == "i.json" else {1, 4}
        target = tmp_path / "out" / name
        benchmarks.without(path, target, gone)
        after = list(benchmarks.items(name, target))
        assert [i.texts for i in after] == [i.texts for k, i in enumerate(before) if k not in gone], name
        whole = tmp_path / "whole" / name
        benchmarks.without(path, whole, set())
        assert list(benchmarks.items(name, whole)) == before, name
        if path.suffix == ".jsonl":
            assert whole.read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "out" / "e.json").read_text()) == {
        "v": "1",
        "easy": rows[:1],
        "hard": rows[2:4],
    }


def test_benchmarks_without_anything_to_look_for_are_an_error(world: Any, tmp_path: Path) -> None:
    """An empty file must not end as a corpus that passes for clean."""
    store, corpus, _ = world
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "short.jsonl").write_text('{"q": "too short"}\n')
    empty, short = (store.add(tmp_path / name) for name in ("empty.jsonl", "short.jsonl"))
    for bench in (empty, short):
        with pytest.raises(UserError, match="nothing can be looked for"):
            config = decontaminate_stage.Config()
            stage.execute(store, "decontaminate", config, {"corpus": corpus, "benchmarks": bench})
    with pytest.raises(UserError, match="hold no items"):
        unseen((store, corpus, empty))
    assert ids(unseen((store, corpus, short))) == ["0"]
