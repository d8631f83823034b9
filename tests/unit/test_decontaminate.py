"""Benchmark text in training text: planted questions are found in every spelling, nothing else is; the
report."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from caravan import stage
from caravan.data import benchmarks, records, rewrite
from caravan.data import decontaminate as grams
from caravan.data.decontaminate import Hit, Index
from caravan.data.dedup import units
from caravan.stages import corpus as corpus_stage
from caravan.stages import decontaminate as decontaminate_stage
from caravan.store import Artefact, Store
from caravan.types import UserError

VOCAB = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "l")]


def prose(seed: int, words: int = 100) -> str:
    return " ".join(random.Random(seed).choices(VOCAB, k=words))


def index(*texts: str, fewest: int = 8) -> Index:
    out = Index(fewest=fewest)
    for text in texts:
        out.add(text)
    return out


def test_words_are_those_of_a_regular_expression() -> None:
    import re
    import unicodedata

    pattern = re.compile(r"\d+|[\u3400-\u9fff]|[^\W\d\u3400-\u9fff]+|[+\-*/=<>%]")
    for text in (
        "12 + 29 = 41%, a_b c3d",
        "Ｆｕｌｌ ﬁne ① ²",
        "请问 len 是什么？x<y",
        "cafe\u0301 ΟΔΟΣ ١٢",
        "",
    ):
        assert grams.words(text) == pattern.findall(unicodedata.normalize("NFKC", text).lower())


def test_a_match_is_thirteen_words_whatever_their_marks() -> None:
    question = prose(1, 20)
    wanted = index(question)
    words = question.split()
    spelt = prose(2) + " " + ",\n".join(words[3:16]).upper() + "! " + prose(3)
    ((hit,),) = wanted.search([spelt])
    assert spelt[hit.start : hit.stop] == ",\n".join(words[3:16]).upper()
    assert wanted.search([prose(2) + " " + " ".join(words[3:15]) + " " + prose(3)]) == [[]]
    assert wanted.search(["", " ".join(words[:10]), " ".join(words[10:])]) == [[], [], []], "not across texts"


def test_a_short_question_must_be_there_as_a_whole() -> None:
    wanted = index(prose(1, 9), prose(2, 5))
    assert [bool(h) for h in wanted.search([f"x {prose(1, 9)} y", prose(1, 8), f"x {prose(2, 5)} y"])] == [
        True, False, False,
    ]  # fmt: skip
    assert [w.add(prose(3, 7)) for w in (index(), index(fewest=4))] == [False, True]


def test_equal_hashes_are_not_equal_words(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [prose(k) for k in range(30)]
    questions = [prose(100 + k, 16) for k in range(10)]
    texts[4] += " " + questions[2]
    true = index(*questions).search(texts)
    windows = units.windows
    monkeypatch.setattr(
        grams, "windows", lambda h, n: windows(h, n) >> units.np.uint64(60) << units.np.uint64(60)
    )
    assert index(*questions).search(texts) == true and len(true[4]) == 4


def test_places_in_text_that_unicode_spells_otherwise() -> None:
    words = [*prose(1, 12).split(), "café"]
    spelt = "ﬁ e\u0301 " + " ".join(words).replace("é", "e\u0301").replace("n", "ｎ") + " ﬁ"
    ((hit,),) = index(" ".join(words)).search([spelt])
    assert spelt[hit.start : hit.stop] == spelt.removeprefix("ﬁ e\u0301 ").removesuffix(" ﬁ")
    korean = "가" * 3 + " " + " ".join(words)
    import unicodedata

    apart = unicodedata.normalize("NFD", korean)
    ((hit,),) = index(" ".join(words)).search([apart])
    assert unicodedata.normalize("NFC", apart[hit.start : hit.stop]) == " ".join(words)


def test_overlapping_matches_are_one_cut() -> None:
    hits = [Hit(300 + k, 400 + k, k) for k in range(0, 60, 7)]
    assert grams.merged(hits) == [(300, 456)]
    text = "a" * 1000
    assert grams.pieces(text, hits) == (["a" * 344], 1)
    assert grams.pieces(text, [Hit(500, 510, 0)]) == (["a" * 300, "a" * 290], 1)
    assert grams.pieces(text, [Hit(k, k + 1, 0) for k in (0, 999)], around=10, least=1) == (["a" * 978], 2)
    assert grams.masked("one two three", [Hit(4, 7, 0), Hit(5, 7, 1)]) == "one … three"


def test_a_prompts_wording_is_no_question() -> None:
    prompt = prose(5, 14)
    questions = [f"{prompt} {prose(10 + k, 15)}" for k in range(6)]
    wanted = index(*questions, prompt)
    owner = list(range(7))
    assert grams.template(wanted, owner, 9) == set()
    spared = grams.template(wanted, owner, 5)
    assert spared == set(), "the last item has nothing else"
    assert len(grams.template(index(*questions), owner[:6], 5)) == 2
    assert grams.common(Counter({1: 11, 2: 10}), 10) == {1} and grams.common(Counter({1: 11}), 0) == set()


def test_coverage_is_the_share_of_words_found() -> None:
    wanted = index(prose(1, 26))
    (hits,) = wanted.search([" ".join(prose(1, 26).split()[:13])])
    assert wanted.covered(0, [h.gram for h in hits]) == 0.5


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    rows = [{"id": f"q{k}", "question": prose(k, 15), "options": [prose(50 + k, 9), "b"]} for k in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps({"version": "1", "data": rows}))
    (tmp_path / "c.csv").write_text("\n".join(f'"{r["question"]}",A,"x\ny"' for r in rows))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress("\n".join(r["question"] for r in rows).encode()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    with records.packed_writer(tmp_path / "f.jsonl.zst") as file:
        file.write((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "notes.md").write_text("not a benchmark")
    items = list(benchmarks.read(tmp_path))
    names = ["a.jsonl", "b.json", "c.csv", "d.txt.gz", "e.parquet", "f.jsonl.zst"]
    assert [(i.benchmark, i.texts) for i in items] == [(n, (r["question"],)) for n in names for r in rows]
    assert items[0].id == "q0" and items[6].id == "0"
    assert list(benchmarks.wanted({"q": prose(1, 10), "options": [prose(2, 9)]})) == [prose(1, 10)]
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"bad\.jsonl"):
        list(benchmarks.read(tmp_path))
    (tmp_path / "bad.jsonl").unlink()
    for name in (
        "g.jsonl.xz",
        "g.arrow",
        "g.tar.gz",
    ):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError, match=f"{name} is a benchmark that cannot be read"):
            list(benchmarks.read(tmp_path))
        (tmp_path / name).unlink()
    (tmp_path / "README.md").write_text("about these")
    assert len(list(benchmarks.read(tmp_path))) == len(items)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no benchmark file"):
        list(benchmarks.read(tmp_path / "empty"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[Artefact], list[Artefact]]:
    """Two benchmarks of ten questions; five of the first stand in documents, one only in part, an idiom in
    many."""
    folder = tmp_path_factory.mktemp("planted")
    idiom = prose(999, 13)
    first = [{"id": f"q{k}", "question": prose(100 + k, 30)} for k in range(9)]
    first.append({"id": "idiom", "question": idiom})
    second = [{"prompt": prose(200 + k, 30), "answer": "42"} for k in range(9)] + [{"prompt": "too short"}]
    for name, rows in (("first.jsonl", first), ("second.jsonl", second)):
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    documents = [{"id": f"d{k:02}", "text": prose(k, 200)} for k in range(40)]
    for k in range(5):
        documents[k]["text"] += "\n" + first[k]["question"].upper() + ".\n" + prose(500 + k, 150)
    documents[5]["text"] += " " + " ".join(first[5]["question"].split()[:15])
    for k in range(20, 32):
        documents[k]["text"] += " " + idiom
    store = Store(folder / "store")
    made = []
    for parts in (1, 3):
        raw = folder / f"raw{parts}"
        raw.mkdir()
        for p in range(parts):
            (raw / f"{p}.jsonl").write_text("\n".join(map(json.dumps, documents[p::parts])))
        cfg = corpus_stage.Config(near_duplicates=0, repetition=False)
        made.append(stage.execute(store, "corpus", cfg, {"raw": store.add(raw)}))
    return store, made, [store.add(folder / "first.jsonl"), store.add(folder / "second.jsonl")]


def cleaned(
    planted: tuple[Store, list[Artefact], list[Artefact]], shards: int = 0, **settings: Any
) -> Artefact:
    store, made, (first, second) = planted
    cfg = decontaminate_stage.Config(**settings)
    rt = stage.Runtime(threads=1 + shards)
    inputs = {"corpus": made[shards], "benchmarks": first, "benchmarks.2": second}
    return stage.execute(store, "decontaminate", cfg, inputs, rt)


def test_planted_questions_are_found_and_reported(planted: Any) -> None:
    art = cleaned(planted)
    removed = {r["id"]: r for r in records.read_lines(art / "removed.jsonl.zst")}
    assert removed.keys() == {f"d{k:02}" for k in range(6)}
    assert removed["d03"]["items"] == ["first.jsonl q3"] and removed["d03"]["rule"] == "contaminated"
    page = json.loads((art / "contamination.json").read_text())
    assert [page["first.jsonl"][k] for k in ("items", "checked", "hit", "share")] == [10, 10, 6, 0.6]
    assert [page["second.jsonl"][k] for k in ("items", "checked", "hit")] == [10, 9, 0]
    assert page["first.jsonl"]["samples"][0]["item"] == "q0"
    items = {r["id"]: r for r in map(json.loads, (art / "items.jsonl").read_text().splitlines()[:10])}
    assert items["q2"]["seen"] and items["q2"]["share"] == 1 and items["q2"]["documents"] == ["d02"]
    assert items["q5"]["share"] == 0.5 and not items["q7"]["seen"] and not items["idiom"]["seen"]
    assert art.facts["documents_hit"] == 6 and art.facts["spared"] == {"template": 0, "common": 1}
    everything = cleaned(planted, common_documents=0)
    assert everything.facts["documents_hit"] == 18
    items = {r["id"]: r for r in map(json.loads, (everything / "items.jsonl").read_text().splitlines()[:10])}
    assert len(items["idiom"]["documents"]) == 10, "of twelve"


def test_shards_and_workers_change_nothing(planted: Any) -> None:
    one, other = cleaned(planted), cleaned(planted, 1)
    assert sorted((one / "items.jsonl").read_text().split()) == sorted(
        (other / "items.jsonl").read_text().split()
    )
    pages = [json.loads((art / "contamination.json").read_text()) for art in (one, other)]
    for page in pages:  # a source is the file a document was in
        assert page["first.jsonl"]["documents"] == sum(page["first.jsonl"].pop("sources").values()) == 6
        page["second.jsonl"].pop("sources")
        page["first.jsonl"]["samples"].sort(key=lambda s: s["item"])
    assert pages[0] == pages[1]
    assert sorted(d.id for _, d in rewrite.read(one.path)) == sorted(
        d.id for _, d in rewrite.read(other.path)
    )


def test_cut_mask_and_report(planted: Any) -> None:
    whole = {d.id: d.text for _, d in rewrite.read(planted[1][0].path)}
    cut = {d.id: d.text for _, d in rewrite.read(cleaned(planted, action="cut").path)}
    head, tail = cut["d01"].split("\n\n")
    assert whole["d01"].startswith(head) and whole["d01"].endswith(tail)
    question = prose(101, 30).upper()
    at = whole["d01"].index(question)
    assert (
        abs(len(head) - (at - 200)) <= 1
        and abs(len(tail) - (len(whole["d01"]) - at - len(question) - 200)) <= 1
    )
    few = cleaned(planted, action="cut", most_cuts=1, least_chars=5000)
    assert few.facts["removed"] == {"contaminated": 6}
    masked = {d.id: d.text for _, d in rewrite.read(cleaned(planted, action="mask").path)}
    assert masked["d01"] == whole["d01"].replace(question, "…") and masked["d30"] == whole["d30"]
    report = cleaned(planted, action="report")
    assert {d.id: d.text for _, d in rewrite.read(report.path)} == whole and report.facts[
        "documents_hit"
    ] == 6
    with pytest.raises(UserError, match="no action"):
        cleaned(planted, action="burn")


def test_real_benchmarks_are_read_and_planted_items_found(kit: Path) -> None:
    """Every benchmark of the kit: one question of each file planted in a book."""
    book = next((kit / "pretrain" / "en_books").glob("*")).read_text(encoding="utf-8")[:100_000]
    files = [
        "gsm8k/train.jsonl", "commonsense/ARC-Easy_train.json", "code/mbpp_sanitized.jsonl",
        "lambada_first_1000.jsonl", "bbq/Age.jsonl", "math/mawps_train.json",
    ]  # fmt: skip
    there = [kit / "bench" / f for f in files if (kit / "bench" / f).exists()]
    there += sorted((kit / "bench" / "mmlu" / "val").glob("*.csv"))[:3]
    there += sorted((kit / "bench" / "agieval").glob("*"))[:2]
    assert len(there) >= 9
    for path in there:
        items = list(itertools.islice(benchmarks.read(path), 300))
        wanted, owner = Index(), []
        for number, item in enumerate(items):
            for text in item.texts:
                owner.append(number)
                wanted.add(text)
        checked = [n for n, item in enumerate(items) if any(len(grams.words(t)) >= 8 for t in item.texts)]
        assert len(checked) > 0.2 * len(items), path
        assert wanted.search([book]) == [[]], "no book holds any"
        number = checked[len(checked) // 2]
        text = max(items[number].texts, key=lambda t: len(grams.words(t)))
        (hits,) = wanted.search([book[:5000] + "\n" + text.replace(" ", "  ") + "\n" + book[5000:9000]])
        assert number in {owner[t] for h in hits for t in wanted.owners(h.gram)}, path
