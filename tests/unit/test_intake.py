"""Conversations and preferences of which nothing is kept in memory, against sets and lists that keep all."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caravan import stage
from caravan.data import dedup, records
from caravan.data.dedup import keepers
from caravan.stages import conversations, preferences
from caravan.stages._intake import Sizes
from caravan.store import Artefact, Store

DRAW = random.Random(4)
WORDS = [f"w{k}" for k in range(500)]
ITEMS = [" ".join(DRAW.choices(WORDS, k=20)) for _ in range(9)]
SIMILARITY = 0.8


def prose(count: int) -> str:
    return " ".join(DRAW.choices(WORDS, k=count))


def chats() -> list[dict[str, Any]]:
    """Of ten one is a copy, one nearly so, and one holds an item of a benchmark."""
    out: list[dict[str, Any]] = []
    for k in range(400):
        turns = [{"role": "user", "content": prose(12)}, {"role": "assistant", "content": prose(40)}]
        row: dict[str, Any] = {"messages": turns, "id": f"c{k}"}
        if k % 10 == 7:
            # What a copy asks for counts for nothing.
            row = {**out[DRAW.randrange(k)], "id": f"again{k}", "split": "heldout"}
        elif k % 10 == 8:
            turns[0], answer = out[k - 5]["messages"]
            turns[1] = {"role": "assistant", "content": answer["content"] + " so be it"}
        elif k % 10 == 9:
            turns[1]["content"] += f", {DRAW.choice(ITEMS)}."
        if k % 40 == 3:
            row["split"] = DRAW.choice(["train", "heldout"])
        out.append(row)
    return out


def pairs() -> list[dict[str, Any]]:
    """Rankings and labelled answers of some prompts, copies and near copies among them."""
    prompts, out = [prose(8) for _ in range(60)], list[dict[str, Any]]()
    for k in range(500):
        row = {"prompt": DRAW.choice(prompts), "chosen": prose(30), "rejected": prose(3 + k % 20)}
        if k % 10 == 7:
            row = {**out[k // 10 * 10]}
        elif k % 10 == 8:
            row = {**out[k // 10 * 10], "rejected": "no"}
        elif k % 10 in (5, 6):
            row = {"prompt": DRAW.choice(prompts), "completion": prose(20), "label": k % 2 == 0}
        out.append(row)
    return out


def run(tmp_path: Path, kind: str, rows: list[dict[str, Any]]) -> Artefact:
    folder = tmp_path / f"{kind}-raw"
    folder.mkdir(parents=True)
    shapes: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        shapes.setdefault("b" if "label" in row else "a", []).append(row)
    for name, some in shapes.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    (tmp_path / "items.txt").write_text("\n".join(ITEMS))
    store = Store(tmp_path / "store")
    inputs = {"raw": store.add(folder), "benchmarks": store.add(tmp_path / "items.txt")}
    module = {"conversations": conversations, "preferences": preferences}[kind]
    cfg = module.Config(near_duplicates="drop", similarity=SIMILARITY, heldout_share=0.1, memory_mb=1)
    return stage.execute(store, kind, cfg, inputs)


def near(texts: list[str], hashes: list[int], heldout: list[bool]) -> set[int]:
    """Places that go, all links and ranks held at once."""
    ranks, links = dedup.Ranks(), dedup.Links(len(texts))
    ranks.add(hashes, [len(t) for t in texts], heldout)
    rows = dedup.signatures(texts)
    alike = (rows[:, None] == rows).mean(axis=2) >= SIMILARITY - 1e-9
    links.add(*np.nonzero(alike))
    return set(links.clusters(ranks)[0].tolist())


@pytest.fixture(params=[1, 9])
def ranges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """In how many ranges keys are sorted."""
    monkeypatch.setattr(keepers, "SORT_BYTES", request.param * (1 << 20) // 500)
    return int(request.param)


def test_conversations_by_sets(tmp_path: Path, ranges: int) -> None:
    rows = chats()
    seen: set[str] = set()
    unique = []
    for row in rows:
        key = json.dumps(row["messages"])
        if key not in seen:
            unique.append(row)
        seen.add(key)
    texts = ["\n".join(m["content"] for m in row["messages"]) for row in unique]
    digests = [records.digest_of(*(x for m in r["messages"] for x in m.values())) for r in unique]
    gone = near(texts, [int(d[:16], 16) for d in digests], [r.get("split") == "heldout" for r in unique])
    held = {k for k, text in enumerate(texts) if any(item in text for item in ITEMS)}
    art = run(tmp_path, "conversations", rows)
    facts = art.facts
    assert facts["duplicates"] == len(rows) - len(unique) == 40
    assert (facts["near_duplicates"], facts["contaminated"]) == (len(gone), len(held))
    assert len(gone) >= 30 <= len(held) and facts["removed"] == len(gone | held)
    stays = [row["id"] for k, row in enumerate(unique) if k not in gone | held]
    kept = {split: [r["id"] for r in records.read_lines(art / f"{split}.jsonl")] for split in records.SPLITS}
    assert sorted(kept["train"] + kept["heldout"]) == sorted(stays)
    assert all(ids == [i for i in stays if i in set(ids)] for ids in kept.values()), "in their order"
    removed = {r["id"]: r["rule"] for r in records.read_lines(art / "removed.jsonl")}
    assert {i for i, rule in removed.items() if rule == "benchmark"} == {unique[k]["id"] for k in held}
    asked = [len(row["messages"][0]["content"]) for row in unique]
    lower = np.percentile(asked, (50, 90, 99), method="lower").tolist()
    assert list(facts["question_chars"].values()) == [*lower, max(asked)]
    assert facts["answers"] == len(unique)


def test_preferences_by_sets(tmp_path: Path, ranges: int) -> None:
    rows = pairs()
    unique = {json.dumps(row): row for row in rows}.values()
    art = run(tmp_path, "preferences", rows)
    facts = art.facts
    prompts = {row["prompt"] for row in unique}
    assert facts["duplicates"] == len(rows) - len(unique) >= 50
    assert facts["prompts"] == len(prompts) and facts["prompt_chars"]["max"] == max(map(len, prompts))
    assert sum(facts["languages"].values()) == len(prompts)
    labels = [row for row in unique if "label" in row]
    assert facts["good"] + facts["bad"] == len(labels) and facts["pairs"] == len(unique) - len(labels)
    answers = [len(row.get("completion", "")) or [len(row["chosen"]), len(row["rejected"])] for row in unique]
    flat = [n for size in answers for n in ([size] if isinstance(size, int) else size)]
    lower = np.percentile(flat, (50, 90, 99), method="lower").tolist()
    assert list(facts["answer_chars"].values()) == [*lower, max(flat)]
    names = [f"{split}{suffix}" for split in records.SPLITS for suffix in (".jsonl", ".labels.jsonl")]
    kept = sum(1 for name in names for _ in records.read_lines(art / name))
    assert kept == facts["rankings"] + facts["labels"] == len(unique) - facts["removed"]
    assert facts["near_duplicates"] >= 20


def test_memory_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"conversations": chats(), "preferences": pairs()}
    for kind, rows in made.items():
        ids = set()
        for count in (1, 40):
            monkeypatch.setattr(keepers, "SORT_BYTES", count * (1 << 20) // 500)
            ids.add(run(tmp_path / str(count), kind, rows).id)
        assert len(ids) == 1


@given(st.lists(st.integers(0, 3000), max_size=200))
def test_sizes_are_numpys_percentiles(sizes: list[int]) -> None:
    one = Sizes()
    for size in sizes:
        one.add(size)
    if not sizes:
        assert one.facts() == {}
        return
    lower = np.percentile(sizes, (50, 90, 99), method="lower").tolist()
    assert orjson.loads(orjson.dumps(one.facts())) == dict(
        zip(("p50", "p90", "p99", "max"), [*lower, max(sizes)], strict=True)
    )
