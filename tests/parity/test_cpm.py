"""CPM-Ant and CPM-Bee beyond the checks of every family: packed texts, what is context, graphs of segments
given by hand, gradients, reward models."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from caravan import outside
from caravan.kernels.attention import Segments
from caravan.model import checkpoint, grow
from caravan.model.decoder import prefixes
from caravan.model.encoders.cpm import Graph
from caravan.model.heads import RewardModel
from caravan.types import UserError
from tests.families import TOLERANCE, VOCAB, bert, cpmant, cpmbee

pytest.importorskip("transformers")


def rows(lengths: tuple[int, ...]) -> list[list[int]]:
    draw = random.Random(4)
    return [[draw.randrange(3, VOCAB) for _ in range(n)] for n in lengths]


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.std())


def ant(folder: Path, case: int = 0) -> tuple[Any, Any]:
    """(the class's model, ours) of a case."""
    hf = cpmant.CASES[case].hf()
    hf.save_pretrained(folder)
    return hf, checkpoint.load_model(folder)


# --------------------------------------------------------------------------------------------------- Ant


@pytest.mark.parametrize("case", [0, 1])
@torch.no_grad()
def test_packed_texts_of_an_ant_are_single_texts(case: int, tmp_path: Path) -> None:
    """Everything is context, as in the class."""
    hf, model = ant(tmp_path, case)
    lengths = (5, 1, 13, 9, 5, 14)
    texts = rows(lengths)
    batch = bert.batch(texts)
    got = model.logits(model(batch.ids_N, batch.pos_N, Segments(lengths)))
    want = torch.cat([hf(input_ids=torch.tensor([text])).logits[0] for text in texts])
    assert error(got, want) < TOLERANCE


@torch.no_grad()
def test_without_a_token_that_says_so_an_ant_reads_causally(tmp_path: Path) -> None:
    """In training and generation; otherwise a loss would be of tokens the model has already read."""
    _, model = ant(tmp_path, 1)
    ids = torch.tensor(rows((9,))[0])
    assert prefixes(model.spec, ids, (9,)) == (0,)
    at = torch.arange(9)
    before = model(ids, at, Segments((9,), prefix=(0,)))
    ids[6] += 1
    after = model(ids, at, Segments((9,), prefix=(0,)))
    changed = (before - after).abs().amax(1) > 1e-6
    assert changed.tolist() == [False] * 6 + [True] * 3


@torch.no_grad()
def test_what_follows_the_prefix_is_not_seen_by_it(tmp_path: Path) -> None:
    _, model = ant(tmp_path)
    batch = bert.batch(rows((9, 7)))
    attend = Segments((9, 7), prefix=(4, 2))
    before = model(batch.ids_N, batch.pos_N, attend)
    ids = batch.ids_N.clone()
    ids[6] += 1
    after = model(ids, batch.pos_N, attend)
    changed = (before - after).abs().amax(1) > 1e-6
    assert changed.tolist() == [False] * 6 + [True] * 3 + [False] * 7
    ids = batch.ids_N.clone()
    ids[3] -= 1
    assert bool(((before - model(ids, batch.pos_N, attend)).abs().amax(1) > 1e-6)[:9].all())


# --------------------------------------------------------------------------------------------------- Bee


def bee(folder: Path, **more: Any) -> tuple[Any, dict[str, Tensor]]:
    """(our model, the tensors of its file)."""
    tensors = cpmbee.weights()
    (folder / "config.json").write_text(json.dumps(cpmbee.BEE | more))
    save_file(tensors, folder / "model.safetensors")
    return checkpoint.load_model(folder), tensors


@torch.no_grad()
def test_bees_read_graphs_of_segments(tmp_path: Path) -> None:
    model, tensors = bee(tmp_path)
    draw = random.Random(7)
    lengths = (9, 4, 9)
    facts, edges = [], []
    for length in lengths:
        text = []
        for at in range(length):
            sample = 1 if at in (2, 3) and length == 9 else 0
            count = 1 if sample else 3
            text.append(
                {"sub": draw.randrange(3), "context": at < 5, "sample": sample, "count": count,
                 "segment": min(at // 2, count - 1), "offset": 9 if sample else 0}
            )  # fmt: skip
        facts.append(text)
        edges.append([0, 2, 3, 4, 0, 1, 2, 3, 0, 0])
    names = {"sub": "sub_N", "context": "context_N", "sample": "sample_N", "segment": "segment_N",
             "count": "count_N", "offset": "offset_N"}  # fmt: skip
    flat = [fact for text in facts for fact in text]
    graph = Graph(
        **{long: torch.tensor([fact[short] for fact in flat]) for short, long in names.items()},
        edges=[torch.tensor(table) for table in edges],
    )
    texts = rows(lengths)
    batch = bert.batch(texts)
    got = model(batch.ids_N, batch.pos_N, Segments(lengths), graph=graph)
    want = [cpmbee.states(cpmbee.BEE, tensors, *known) for known in zip(texts, facts, edges, strict=True)]
    assert error(got, torch.cat(want)) < TOLERANCE


@torch.no_grad()
def test_bees_know_words_that_are_not_in_their_table(tmp_path: Path) -> None:
    model, tensors = bee(tmp_path)
    hidden = torch.randn(3, 48)
    words = model.tokens(torch.tensor([5, 9]), torch.tensor([1, 4]))
    logits = model.logits(hidden, words)
    table = tensors["cpmbee.input_embedding.weight"]
    by_hand = [cpmbee.embedded(cpmbee.BEE, table, token, sub) for token, sub in ((5, 1), (9, 4))]
    torch.testing.assert_close(logits[:, VOCAB:], hidden @ torch.stack(by_hand).T)
    torch.testing.assert_close(logits[:, :VOCAB], hidden / 48**0.5 @ table.T)


def test_gradients_of_a_bee_are_the_slow_ones(tmp_path: Path) -> None:
    """Also of the table of biases, through attention of our own."""
    model, tensors = bee(tmp_path)
    ids = cpmbee.ids()
    exact = {key: t.clone().requires_grad_() for key, t in tensors.items()}
    want = cpmbee.oracle(cpmbee.BEE, exact, ids)
    got_loss, want_loss = (
        torch.nn.functional.cross_entropy(said[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for said in (packed(model, ids), want)
    )
    got_loss.backward()
    want_loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            p.copy_(p.grad)
    mine = checkpoint.export_tensors(model)
    assert mine.keys() == exact.keys()
    for key, t in exact.items():
        assert t.grad is not None and float(t.grad.std()) > 0
        assert error(mine[key], t.grad) < TOLERANCE, key


def packed(model: Any, ids_BT: Tensor) -> Tensor:
    count, width = ids_BT.shape
    lengths = (width,) * count
    attend = Segments(lengths, prefix=prefixes(model.spec, ids_BT.flatten(), lengths))
    hidden = model(ids_BT.flatten(), torch.arange(width).repeat(count), attend)
    return model.logits(hidden).view(count, width, -1)


def test_ids_of_a_bees_tokens_are_read_from_its_vocabulary(tmp_path: Path) -> None:
    """The release says them nowhere else; our export does."""
    bare = {key: value for key, value in cpmbee.BEE.items() if not key.endswith("_token_id")}
    (tmp_path / "config.json").write_text(json.dumps(bare))
    assert checkpoint.load_spec(tmp_path).bos is None and checkpoint.load_spec(tmp_path).prefix_token == -1
    (tmp_path / "vocab.txt").write_text("<pad>\n\n<s>\n</s>\nword\n<ans>\n")
    spec = checkpoint.load_spec(tmp_path)
    assert (spec.bos, spec.prefix_token) == (1, 4), "empty lines do not count"
    empty = {"bos_token_id": None, "answer_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(bare | empty))
    assert checkpoint.load_spec(tmp_path) == spec, "null says nothing"
    save_file(cpmbee.weights(), tmp_path / "model.safetensors")
    checkpoint.save_model(checkpoint.load_model(tmp_path), tmp_path / "out", dtype=torch.float32)
    assert checkpoint.load_spec(tmp_path / "out") == spec
    (tmp_path / "config.json").write_text(json.dumps(bare | {"position_bias_num_segment_buckets": 18}))
    with pytest.raises(UserError, match="position_bias_num_segment_buckets"):
        checkpoint.load_spec(tmp_path)


@pytest.mark.parametrize("value", ["x", [1], 1.0, True, -1, VOCAB])
@pytest.mark.parametrize("key", ["bos_token_id", "answer_token_id"])
def test_ids_that_are_none_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(cpmbee.BEE | {key: value}))
    with pytest.raises(UserError, match=f"'{key}' is .*, wanted a token id below {VOCAB}"):
        checkpoint.load_spec(tmp_path)


def test_a_bees_vocabulary_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(cpmbee.BEE))
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe<s>")
    with pytest.raises(UserError, match=r"vocab\.txt is not UTF-8"):
        checkpoint.load_spec(tmp_path)


@pytest.mark.parametrize("kind", ["ant", "bee"])
@torch.no_grad()
def test_a_reward_model_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    model = ant(tmp_path)[1] if kind == "ant" else bee(tmp_path)[0]
    judge = RewardModel(model, checkpoint.fresh_head(model, torch.Generator().manual_seed(0)))
    batch = bert.batch(cpmbee.ids().tolist())
    want = judge.scores(batch)
    checkpoint.save_reward(judge, tmp_path / "out", dtype=torch.float32)
    config = checkpoint.read_config(tmp_path / "out")
    assert config["architectures"] == [{"ant": "CpmAnt", "bee": "CpmBee"}[kind] + "ForSequenceClassification"]
    again = checkpoint.load_reward(tmp_path / "out")
    assert torch.equal(again.scores(batch), want) and want.std() > 0
    with pytest.raises(UserError, match="reward model"):
        checkpoint.load_model(tmp_path / "out")


@torch.no_grad()
def test_a_bee_grows_and_the_tokens_it_reads_by_stay(tmp_path: Path) -> None:
    model, _ = bee(tmp_path)
    same = [(i,) for i in range(VOCAB)]
    grown = grow.resize(model, [*same, (5, 9)], VOCAB + 3)
    checkpoint.save_model(grown, tmp_path / "out", dtype=torch.float32)
    again = checkpoint.load_model(tmp_path / "out")
    assert again.spec.vocab == VOCAB + 3 and again.spec.bos == model.spec.bos
    ids = cpmbee.ids()
    assert error(packed(again, ids)[..., :VOCAB], packed(model, ids)) < 1e-6
    assert torch.allclose(again.embed.weight[VOCAB], model.embed.weight[[5, 9]].mean(0))
    for at in (model.spec.bos, model.spec.prefix_token):
        with pytest.raises(UserError, match=f"id {at}"):
            grow.resize(model, [(i,) if i != at else (0,) for i in range(VOCAB)], VOCAB)
    with pytest.raises(UserError, match="more than words"):
        grow.resize(ant(tmp_path / "ant")[1], same, VOCAB)


@torch.no_grad()
def test_a_release_of_pickles_is_converted_as_the_docs_say(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
    (code,) = (part for part in re.findall("```python\n(.*?)```", page, re.DOTALL) if "torch.load" in part)
    tensors = cpmbee.weights()
    (tmp_path / "config.json").write_text(json.dumps(cpmbee.BEE))
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="pickles"):
        outside.files(tmp_path, "model")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert "model.safetensors" in outside.files(tmp_path, "model")[0]
    ids = cpmbee.ids()
    assert error(packed(checkpoint.load_model(tmp_path), ids), cpmbee.oracle(cpmbee.BEE, tensors, ids)) < 5e-5
