"""pretrain --base: going on from a model of any family, on text in its own vocabulary."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from caravan.data import shards, tokenizer
from caravan.data.tokenizer import Tokenizer
from caravan.model import checkpoint
from caravan.model.sizes import derive, fresh
from caravan.stage import Runtime, execute
from caravan.stages import pretrain
from caravan.store import Artefact, Store
from caravan.types import UserError

TEXTS = [f"The fox {i} jumps over {i + 1} dogs and sees {2 * i} cats." for i in range(60)]
RT = Runtime(device="cpu", threads=1)
SHORT: dict[str, Any] = {"context": 32, "batch_tokens": 256, "micro_tokens": 128, "precision": "fp32"}


def cut(folder: Path, tok: Tokenizer) -> Path:
    """Shards of the texts."""
    tok.save(folder / "tokenizer")
    rows = list(shards.encode_documents(TEXTS, tok))
    shards.write(folder, {"train": rows[:50], "heldout": rows[50:]}, tok.vocab_size)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def given(store: Store, tmp_path: Path) -> dict[str, Artefact]:
    """A base of our own and shards in its vocabulary."""
    tok = tokenizer.train(TEXTS, 300)
    tok.save(tmp_path / "tok")
    spec, _ = derive("nano", None, tok.vocab_size, 64)
    checkpoint.save_model(fresh(spec, 5), tmp_path / "m", tmp_path / "tok", torch.float32)
    made = store.add(cut(tmp_path / "s", tok), "shards")
    return {"base": store.add(tmp_path / "m", "model"), "shards": made}


def go(store: Store, given: dict[str, Artefact], **config: Any) -> Artefact:
    return execute(store, "pretrain", pretrain.Config(**SHORT | config), given, RT)


def test_training_goes_on_from_the_base(store: Store, given: dict[str, Artefact]) -> None:
    """At rate 0 nothing has changed, so the first loss is the base's; then it falls from there."""
    same = go(store, given, steps=2, lr=0.0, weight_decay=0.0)
    before, after = (checkpoint.load_model(a.path) for a in (given["base"], same))
    for name, p in before.named_parameters():
        assert torch.equal(p, after.get_parameter(name)), name
    trained = go(store, given, tokens=8192, lr=3e-3)
    assert trained.facts["heldout_loss"] < same.facts["heldout_loss"] - 1
    further = go(store, {**given, "base": trained}, tokens=2048, lr=3e-4, warmup_steps=0)
    lines = [json.loads(line) for line in (further.path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] < trained.facts["loss"] + 0.3, "it starts where the other ended"
    assert further.facts["loss"] < trained.facts["loss"] + 0.05


def test_without_a_budget_the_shards_are_read_once_at_a_tenth_of_the_rate(
    store: Store, given: dict[str, Artefact]
) -> None:
    made = go(store, given)
    assert 0.9 < made.facts["epochs"] <= 1.2
    fresh_lr = go(store, {"shards": given["shards"]}, size="nano", steps=1).facts["lr"]
    assert made.facts["lr"] == pytest.approx(fresh_lr / 10)


def test_tables_alone(store: Store, given: dict[str, Artefact]) -> None:
    made = go(store, given, only="tables", steps=3, lr=1e-2)
    before, after = (checkpoint.load_model(a.path) for a in (given["base"], made))
    changed = {n for n, p in before.named_parameters() if not torch.equal(p, after.get_parameter(n))}
    assert changed == {"embed.weight"}


@pytest.mark.parametrize("family", ["bloom", "mamba", "mixtral"])
def test_bases_of_other_families(family: str, store: Store, tmp_path: Path) -> None:
    """A tiny model of transformers, with ids of a small vocabulary: it learns, and transformers opens it."""
    pytest.importorskip("transformers")
    hf = importlib.import_module(f"tests.families.{family}").CASES[0].hf()
    hf.resize_token_embeddings(320)
    hf.save_pretrained(tmp_path / "m")
    tok = tokenizer.train(TEXTS, 300)
    tok.save(tmp_path / "m")
    given = {
        "base": store.add(tmp_path / "m", "model"),
        "shards": store.add(cut(tmp_path / "s", tok), "shards"),
    }
    done = go(store, given, steps=24, lr=3e-3)
    lines = [json.loads(line) for line in (done.path / "metrics.jsonl").read_text().splitlines()]
    steps = [line["loss"] for line in lines if "loss" in line]
    assert steps[0] - 0.5 > steps[-1]
    again = type(hf).from_pretrained(done.path, dtype=torch.float32).eval()
    ids = torch.tensor([tok.encode(TEXTS[0])[:20]])
    with torch.no_grad():
        from caravan.kernels.attention import Segments

        ours = checkpoint.load_model(done.path)
        n = ids.shape[1]
        mine = ours.logits(ours(ids[0], torch.arange(n), Segments((n,))))
        theirs = again(input_ids=ids, use_cache=False).logits[0]
    assert float((mine - theirs).abs().max() / theirs.std()) < 1e-4


def test_what_does_not_fit_is_refused(store: Store, given: dict[str, Artefact], tmp_path: Path) -> None:
    other = tokenizer.train([t.upper() for t in TEXTS], 300)
    foreign = {**given, "shards": store.add(cut(tmp_path / "o", other), "shards")}
    for inputs, config, said in (
        (foreign, {}, "another tokenizer"),
        (given, {"size": "nano"}, "base says what"),
        (given, {"depth": 2}, "base says what"),
        (given, {"context": 65}, "longer than the 64"),
        ({"shards": given["shards"]}, {"only": "tables"}, "give one with --base|going on"),
    ):
        with pytest.raises(UserError, match=said):
            go(store, inputs, steps=1, **config)
