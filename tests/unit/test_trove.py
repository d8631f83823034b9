"""A real datatrove pipeline over our corpus with our steps does what our stages do."""

import random
from pathlib import Path

import orjson
import pytest

from caravan import stage
from caravan.data import clean, records, trove
from caravan.stages import corpus, filter
from caravan.store import Store
from caravan.types import UserError

executor = pytest.importorskip("datatrove.executor", reason="needs the extra `datatrove`")


def texts() -> list[str]:
    """Prose, of which C4 takes some lines, one text too short for Gopher, and one of a repeated line."""
    words = ["the", "of", "and", "to", "with", "have", "that", "be", "caravan", "river", "wanders", "slowly"]
    out = []
    for k in range(30):
        draw = random.Random(k)
        sentences = [" ".join(draw.choices([*words, f"name{k}"], k=15)) + "." for _ in range(6)]
        out.append("\n".join([*sentences, "a menu"] if k % 3 else sentences))
    return [*out, "the of and to with too few words", "\n".join(["no end of it"] * 40)]


def test_our_reader_and_steps_in_their_pipeline(tmp_path: Path) -> None:
    from datatrove.pipeline.writers import JsonlWriter

    (tmp_path / "raw.jsonl").write_bytes(b"".join(orjson.dumps({"text": t}) + b"\n" for t in texts()))
    store = Store(tmp_path / "store")
    raw = {"raw": store.add(tmp_path / "raw.jsonl")}
    loose = corpus.Config(repetition=False, near_duplicates=0, heldout_share=0.0)
    made = {"corpus": stage.execute(store, "corpus", loose, raw)}
    wanted = stage.execute(store, "filter", filter.Config(rules=("gopher", "c4_code"), off=()), made)
    pipeline = [
        trove.Corpus(str(made["corpus"].path)), trove.cleaned(), trove.ruled(("gopher", "c4_code")),
        JsonlWriter(str(tmp_path / "out"), compression=None),
    ]  # fmt: skip
    run = executor.LocalPipelineExecutor(pipeline, tasks=3, logging_dir=str(tmp_path / "logs"))
    run.run()
    files = sorted((tmp_path / "out").glob("*.jsonl"))
    assert len(files) == 3, "each rank its share"
    assert sum(len(file.read_bytes().splitlines()) for file in files) == wanted.facts["train"]
    got = {row["id"]: row for file in files for row in map(orjson.loads, file.read_bytes().splitlines())}
    kept = {d.id: d for d in records.read_documents(wanted / "train.jsonl.zst")}
    assert 20 < len(kept) < len(texts()) and wanted.facts["lines"]["c4_code"]["documents"] > 10
    assert {k: (r["text"], r["metadata"]["lang"]) for k, r in got.items()} == {
        k: (d.text, d.lang) for k, d in kept.items()
    }


def test_their_documents_are_cleaned_and_need_no_corpus() -> None:
    from datatrove.data import Document

    text = "the river  \r\n\r\n\r\n\r\nand the sea"
    (one,) = trove.cleaned()([Document(text, "7")])
    assert (one.id, one.text, one.metadata["lang"]) == ("7", clean.normalise(text), "en")
    assert one.text != text


def test_rules_that_need_more_than_the_text() -> None:
    with pytest.raises(UserError, match="quality"):
        trove.ruled(("pareto",))
