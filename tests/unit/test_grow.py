"""model.grow, stages.grow and stages.upcycle: tables that follow the tokenizer, experts that keep the
function."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from caravan.data.tokenizer import Tokenizer, train
from caravan.kernels.attention import Segments
from caravan.model import checkpoint, grow, sizes
from caravan.model.decoder import Decoder
from caravan.stage import execute
from caravan.stages import grow as stage
from caravan.stages import upcycle
from caravan.store import Artefact, Store
from caravan.types import UserError

ENGLISH = ["the cat sat on the mat and the dog ran to the cat "] * 3
CHINESE = ["猫坐在垫子上，狗跑向猫。"] * 9


def model(tie: bool, vocab: int) -> Decoder:
    spec, _ = sizes.derive("nano", None, vocab, 64)
    return sizes.fresh(replace(spec, layers=spec.layers[:2], tie=tie), 0)


def logits(m: Decoder, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return m.logits(m(torch.tensor(ids), torch.arange(len(ids)), Segments((len(ids),))))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def given(store: Store, tmp_path: Path, tie: bool) -> tuple[Artefact, Tokenizer]:
    tok = train(ENGLISH, 280)
    tok.save(tmp_path / "tok")
    checkpoint.save_model(model(tie, tok.vocab_size + 5), tmp_path / "m", tmp_path / "tok", torch.float32)
    return store.add(tmp_path / "m", "model"), tok


@pytest.mark.parametrize("tie", [True, False])
def test_english_stays_as_it_was_and_new_pieces_are_means(tie: bool, store: Store, tmp_path: Path) -> None:
    art, old = given(store, tmp_path, tie)
    new = old.extended(CHINESE, 30)
    assert new.vocab_size > old.vocab_size
    new.save(tmp_path / "new")
    inputs = {"model": art, "tokenizer": store.add(tmp_path / "new", "tokenizer")}
    done = execute(store, "grow", stage.Config(pad_multiple=64), inputs)
    before, after = checkpoint.load_model(art.path), checkpoint.load_model(done.path)
    assert after.spec.vocab % 64 == 0 and after.spec.vocab >= new.vocab_size
    ids = old.encode("the dog sat on the cat")
    assert Tokenizer.load(done.path).encode("the dog sat on the cat") == ids
    n = old.vocab_size
    assert torch.allclose(logits(after, ids)[:, :n], logits(before, ids)[:, :n], atol=1e-6)
    for name in ("embed.weight", "head.weight")[: 1 if tie else 2]:
        a, b = before.get_parameter(name), after.get_parameter(name)
        assert torch.equal(b[:n], a[:n])
        for i in range(n, new.vocab_size):
            try:
                parts = old.encode(new.bytes_of(i).decode())
            except UnicodeDecodeError:
                parts = [old.encode("")] and [next(j for j in range(n) if old.bytes_of(j) == bytes([x]))
                                              for x in new.bytes_of(i)]  # fmt: skip
            assert torch.allclose(b[i], a[parts].mean(0), atol=1e-6), new.bytes_of(i)
        assert torch.allclose(
            b[new.vocab_size :], a[:n].mean(0).expand(len(b) - new.vocab_size, -1), atol=1e-6
        )
    assert done.facts["ids_new"] == new.vocab_size - n and done.facts["ids_kept"] == n
    config = json.loads((done / "config.json").read_text())
    assert config["vocab_size"] == after.spec.vocab and config["eos_token_id"] == new.eos


def test_pruning_keeps_the_logits_of_what_is_left(store: Store, tmp_path: Path) -> None:
    art, old = given(store, tmp_path, False)
    new, kept = old.pruned(["the cat"])
    new.save(tmp_path / "new")
    (tmp_path / "new/kept_ids.json").write_text(json.dumps(kept))
    # the store takes only what a tokenizer needs; kept_ids.json is JSON and comes along
    inputs = {"model": art, "tokenizer": store.add(tmp_path / "new", "tokenizer")}
    done = execute(store, "grow", stage.Config(pad_multiple=1), inputs)
    before, after = checkpoint.load_model(art.path), checkpoint.load_model(done.path)
    assert after.spec.vocab == new.vocab_size < old.vocab_size
    one, two = old.encode("the cat"), new.encode("the cat")
    assert [kept[i] for i in two] == one
    assert torch.allclose(logits(after, two), logits(before, one)[:, kept], atol=1e-6)
    assert json.loads((done / "config.json").read_text())["eos_token_id"] == new.eos
    # without the list, by the pieces alone
    assert [tuple(r) for r in stage.row_sources(old, new, tmp_path)] == [(i,) for i in kept]
    (tmp_path / "new/kept_ids.json").write_text(json.dumps(kept[::-1]))
    with pytest.raises(UserError, match="does not lead"):
        stage.row_sources(old, new, tmp_path / "new")


def test_rows_alone(store: Store, tmp_path: Path) -> None:
    art, old = given(store, tmp_path, True)
    done = execute(store, "grow", stage.Config(pad_multiple=32), {"model": art})
    assert done.facts["rows"] == -(-old.vocab_size // 32) * 32 and done.facts["ids_new"] == 0
    with pytest.raises(UserError, match="cannot hold"):
        execute(store, "grow", stage.Config(rows=9), {"model": art})


def test_sources_that_cannot_be() -> None:
    with pytest.raises(UserError, match="do not fit"):
        grow.resize(model(True, 9), [(9,)], 4)
    with pytest.raises(UserError, match="do not fit"):
        grow.resize(model(True, 9), [(1,), (2,)], 1)


def test_pieces_find_their_parts() -> None:
    old = [b"a", b"b", b"ab", b"", b"\xe7", b"\x8c"]
    new = [b"ab", b"a", b"abb", b"", b"\xe7\x8c", b"\xff"]
    cut = {"abb": [2, 1]}.__getitem__
    assert grow.of_pieces(old, new, cut) == [(2,), (0,), (2, 1), (3,), (4, 5), ()]


def test_ids_in_configs_move() -> None:
    config = {"eos_token_id": [1, 2], "pad_token_id": 0, "bos_token_id": 2, "d": 1, "x_token_id": None}
    moved = grow.moved_ids(config, [(2,), (1,), (1, 2)])
    assert moved == {"eos_token_id": [1, 0], "bos_token_id": 0, "d": 1, "x_token_id": None}


@pytest.mark.parametrize("method", ["copies", "split"])
def test_experts_keep_the_function_where_theory_says_so(method: str, store: Store, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    art, tok = given(store, tmp_path, False)
    chosen = 2 if method == "copies" else 4
    cfg = upcycle.Config(method=method, experts=4, top_k=chosen, router_std=0.0 if chosen == 4 else None)  # type: ignore[arg-type]
    done = execute(store, "upcycle", cfg, {"model": art})
    ids = tok.encode("the dog sat on the cat")
    want = logits(checkpoint.load_model(art.path), ids)
    assert torch.allclose(logits(checkpoint.load_model(done.path), ids), want, atol=2e-5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(done.path)
    assert type(theirs).__name__ == "MixtralForCausalLM"
    with torch.no_grad():
        assert torch.allclose(theirs(torch.tensor([ids])).logits[0], want, atol=2e-5)
    assert done.facts["family"] == "mixtral" and (done / "tokenizer.json").exists()
    assert done.facts["parameters_per_token"] <= done.facts["parameters"]
