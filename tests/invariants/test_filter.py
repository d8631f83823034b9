"""raw -> corpus -> signals -> filter: thresholds change without measuring again, whatever the processes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from caravan import stage
from caravan.data import records, steps
from caravan.stages import corpus, quality, signals
from caravan.stages import filter as filter_stage
from caravan.store import Artefact, Store
from caravan.types import Document, UserError

VOCAB = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "l")]


def prose(seed: int, sentences: int = 8) -> str:
    draw = random.Random(seed)
    rows = []
    for _ in range(sentences):
        words = draw.sample(VOCAB, 7)
        rows.append(f"The {words[0]} and {words[1]} of " + " ".join(words[2:]) + ".")
    return "\n".join(rows)


def texts() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"id": f"good{k}", "text": prose(k)} for k in range(40)]
    rows += [{"id": f"short{k}", "text": f"Only a few words number {k} in here."} for k in range(6)]
    rows += [{"id": f"brace{k}", "text": prose(100 + k) + "\nThis is a { in a line."} for k in range(3)]
    rows += [{"id": "menu", "text": prose(200) + "\nRead more"}]
    rows += [{"id": f"copy{k}", "text": "\n".join([prose(300 + k, 2)] * 6)} for k in range(4)]
    return rows


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Artefact, Artefact]:
    folder = tmp_path_factory.mktemp("road")
    (folder / "docs.jsonl").write_text("\n".join(json.dumps(row) for row in texts()))
    store = Store(folder / "store")
    raw = store.add(folder / "docs.jsonl")
    cfg = corpus.Config(near_duplicates=0, repetition=False, heldout_share=0.1)
    made = stage.execute(store, "corpus", cfg, {"raw": raw})
    return store, made, stage.execute(store, "signals", signals.Config(), {"corpus": made})


def sift(road: tuple[Store, Artefact, Artefact], *, on_the_way: bool = False, **settings: Any) -> Artefact:
    store, made, table = road
    inputs = {"corpus": made} if on_the_way else {"corpus": made, "signals": table}
    return stage.execute(store, "filter", filter_stage.Config(**settings), inputs)


def documents(art: Artefact) -> Iterator[Document]:
    for split in records.SPLITS:
        yield from records.read_documents(art / f"{split}.jsonl.zst")


def test_signals_lie_beside_the_corpus_in_its_order(road: tuple[Store, Artefact, Artefact]) -> None:
    _, made, table = road
    for split in records.SPLITS:
        rows = pq.read_table(table / f"{split}.parquet")
        ids = [d.id for d in records.read_documents(made / f"{split}.jsonl.zst")]
        assert rows.column("id").to_pylist() == ids
        assert rows.num_columns == len(table.facts["columns"]) + 1
    assert table.facts["documents"] == made.facts["documents_out"]
    assert table.facts["quantiles"]["gopher_words"]["p50"] > 50


def test_rules_remove_and_say_why(road: tuple[Store, Artefact, Artefact]) -> None:
    art = sift(road, rules=("gopher", "c4"))
    facts = art.facts
    left = {d.id for d in documents(art)}
    assert {f"good{k}" for k in range(40)} <= left and "menu" in left
    assert not any(x.startswith(("short", "brace", "copy")) for x in left)
    assert facts["removed"]["gopher_words"] == 6 and facts["removed"]["c4_braces"] == 3
    rule = dict(facts["rules"]["gopher_words"])
    assert "zh" in rule.pop("skip_languages")
    assert rule == {
        "signal": "gopher_words", "limit": "at least 50, at most 100000",
        "broken": 6, "removed": 6, "alone": 0,
    }  # fmt: skip
    assert facts["documents_in"] == facts["documents_out"] + sum(facts["removed"].values())
    removed = list(records.read_lines(art / "removed.jsonl.zst"))
    assert len(removed) == sum(facts["removed"].values())
    assert facts["bytes_in"] - facts["bytes_out"] == sum(r["bytes"] for r in removed) + 10
    assert next(r for r in removed if r["id"] == "short0")["reason"].startswith("gopher_words is ")
    text = next(d.text for d in documents(art) if d.id == "menu")
    assert text == prose(200), "C4's line filter took the line without an end mark"
    assert facts["lines"]["c4"] == {"documents": 1, "chars": 10, "lines": 1}
    kept = sift(road, rules=("gopher", "c4"), edit_lines=False)
    assert next(d.text for d in documents(kept) if d.id == "menu").endswith("Read more")


def test_a_new_threshold_measures_nothing(
    road: tuple[Store, Artefact, Artefact], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sift(road, rules=("gopher",))

    def never(*_: object) -> None:
        raise AssertionError("signals were computed again")

    monkeypatch.setattr("caravan.data.signals.compute", never)
    second = sift(road, rules=("gopher",), limits=("gopher_words.at_least=5",))
    third = sift(road, rules=("gopher",), off=("gopher_words",))
    assert first.facts["removed"]["gopher_words"] == 6
    assert "gopher_words" not in second.facts["removed"] and "gopher_words" not in third.facts["removed"]
    assert second.facts["documents_out"] == third.facts["documents_out"] >= first.facts["documents_out"]


def test_signals_computed_on_the_way_give_the_same_corpus(road: tuple[Store, Artefact, Artefact]) -> None:
    given, computed = sift(road, rules=("gopher", "c4")), sift(road, on_the_way=True, rules=("gopher", "c4"))
    assert list(documents(given)) == list(documents(computed))
    assert given.facts == computed.facts


def test_signals_of_another_corpus_are_refused(road: tuple[Store, Artefact, Artefact]) -> None:
    store, made, table = road
    smaller = sift(road, rules=("gopher",))
    with pytest.raises(UserError, match="another corpus"):
        stage.execute(store, "filter", filter_stage.Config(), {"corpus": smaller, "signals": table})
    few = stage.execute(store, "signals", signals.Config(families=("language", "length")), {"corpus": made})
    with pytest.raises(UserError, match="hold no `") as caught:
        stage.execute(store, "filter", filter_stage.Config(), {"corpus": made, "signals": few})
    assert "family" in (caught.value.hint or "")
    with pytest.raises(UserError, match="the rules need `quality`"):
        sift(road, on_the_way=True, rules=("pareto",))


def test_rules_that_leave_nothing(road: tuple[Store, Artefact, Artefact]) -> None:
    with pytest.raises(UserError, match=r"left nothing of .* by gopher_words"):
        sift(road, rules=("gopher",), limits=("gopher_words.at_least=5000",))


def test_own_rules_come_in_as_a_file(road: tuple[Store, Artefact, Artefact], tmp_path: Path) -> None:
    store, made, table = road
    mine = tmp_path / "mine.toml"
    mine.write_text("[[rule]]\nname = 'few'\nsignal = 'words'\nat_least = 20\n")
    inputs = {"corpus": made, "signals": table, "own": store.add(mine)}
    art = stage.execute(store, "filter", filter_stage.Config(rules=("mine",)), inputs)
    assert art.facts["removed"] == {"few": 6}


def test_one_process_or_three(
    road: tuple[Store, Artefact, Artefact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Corpus, signals and filter: the same files byte for byte. Small batches, so that there are many."""
    small = steps.batches
    monkeypatch.setattr(steps, "batches", lambda items, size, most=0: small(items, size, 2000))
    monkeypatch.setattr("caravan.data.measure.batches", steps.batches)
    ids = []
    for threads in (1, 3):
        store = Store(tmp_path / str(threads))
        (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps(row) for row in texts()))
        rt = stage.Runtime(threads=threads)
        raw = store.add(tmp_path / "docs.jsonl")
        made = stage.execute(store, "corpus", corpus.Config(), {"raw": raw}, rt)
        table = stage.execute(store, "signals", signals.Config(), {"corpus": made}, rt)
        cfg = filter_stage.Config(rules=("gopher", "c4", "refinedweb"))
        measured = stage.execute(store, "filter", cfg, {"corpus": made}, rt)
        given = stage.execute(store, "filter", cfg, {"corpus": made, "signals": table}, rt)
        ids.append([made.id, table.id, measured.id, given.id])
    assert ids[0] == ids[1] and ids[0][2] == ids[0][3]


def test_quality_from_two_corpora_to_a_draw(road: tuple[Store, Artefact, Artefact], tmp_path: Path) -> None:
    store, made, _ = road
    draw = random.Random(1)
    junk = [
        {"id": f"junk{k}", "text": " ".join(draw.choices(["buy", "now", "cheap", *VOCAB[:80]], k=60))}
        for k in range(60)
    ]
    good = [{"id": f"fine{k}", "text": prose(500 + k)} for k in range(60)]
    sides = {}
    for name, rows in (("positive", good), ("negative", junk)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
        cfg = corpus.Config(near_duplicates=0, repetition=False)
        sides[name] = stage.execute(store, "corpus", cfg, {"raw": store.add(tmp_path / f"{name}.jsonl")})
    model = stage.execute(store, "quality", quality.Config(), sides)
    assert model.kind == "classifier" and model.facts["auc"] > 0.95
    assert model.facts["kept_of_positive"] > 10 * model.facts["kept_of_negative"]
    table = stage.execute(
        store, "signals", signals.Config(families=("language",)), {"corpus": made, "quality": model}
    )
    art = stage.execute(
        store, "filter", filter_stage.Config(rules=("pareto",)), {"corpus": made, "signals": table}
    )
    score = np.concatenate(
        [pq.read_table(table / f"{s}.parquet").column("quality").to_numpy() for s in records.SPLITS]
    )
    expected = ((2 - score) ** -9.0).sum()
    assert abs(art.facts["documents_out"] - expected) < 4 * np.sqrt(len(score)) / 2
    one = {"positive": sides["positive"], "negative": sides["positive"]}
    assert abs(stage.execute(store, "quality", quality.Config(), one).facts["auc"] - 0.5) < 0.25


def test_perplexity_of_our_own_model(road: tuple[Store, Artefact, Artefact], tmp_path: Path) -> None:
    """An untrained model knows nothing: about log2(vocabulary) bits per token."""
    import torch

    from caravan.data import tokenizer as tokenizers
    from caravan.model.checkpoint import save_model
    from caravan.model.sizes import derive, fresh

    store, made, _ = road
    tok = tokenizers.train([prose(k) for k in range(30)], 300)
    tok.save(tmp_path / "tok")
    spec, _reasons = derive(None, 1, tok.vocab_size, 64)
    save_model(fresh(spec, 0), tmp_path / "model", tmp_path / "tok", dtype=torch.float32)
    model = store.add(tmp_path / "model", "model")
    cfg = signals.Config(families=("length",), perplexity_tokens=32)
    table = stage.execute(store, "signals", cfg, {"corpus": made, "model": model})
    bits = np.concatenate(
        [pq.read_table(table / f"{s}.parquet").column("bits_per_byte").to_numpy() for s in records.SPLITS]
    )
    assert len(bits) == made.facts["documents_out"] and np.isfinite(bits).all()
    assert 1 < np.median(bits) < np.log2(tok.vocab_size) + 1
