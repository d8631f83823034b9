"""Every family with a classifier class in transformers: its one-label classifiers are our reward models, in
both directions, and a model saved without its head is found again."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from caravan.kernels.attention import Segments
from caravan.model import checkpoint, families
from caravan.stages import reward
from caravan.types import Batch, UserError
from tests import families as tiny

transformers = pytest.importorskip("transformers")


def decoders() -> list[str]:
    """Families that have a case, a classifier in transformers, and no pooling head of their own."""
    names = []
    for name in tiny.names():
        family = families.find(name)
        case = importlib.import_module(f"tests.families.{name}").CASES[0]
        known = hasattr(transformers, family.CLASSIFIER or "-")
        if case.hf and known and not case.disguise and not hasattr(family, "POOL"):
            names.append(name)
    return names


def classifier(name: str, config: Any) -> Any:
    """A randomised one-label classifier of a family, sized as its first case."""
    config.num_labels, config.pad_token_id = 1, 0
    return tiny.randomise(getattr(transformers, families.find(name).CLASSIFIER)(config)).eval()


def first(name: str) -> Any:
    return importlib.import_module(f"tests.families.{name}").CASES[0].hf()


def batch(ids_BT: Tensor) -> Batch:
    rows, width = ids_BT.shape
    return Batch(
        ids_N=ids_BT.flatten(),
        pos_N=torch.arange(width).repeat(rows),
        lengths=(width,) * rows,
        targets_N=torch.zeros(rows * width, dtype=torch.int64),
        weight_N=torch.zeros(rows * width),
    )


@pytest.mark.parametrize("name", decoders())
def test_a_classifier_with_one_label_is_a_reward_model(name: str, tmp_path: Path) -> None:
    theirs = classifier(name, first(name).config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = checkpoint.load_reward(tmp_path / "theirs")
    ids_BT = tiny.ids()
    with torch.no_grad():
        want = theirs(input_ids=ids_BT).logits[:, 0]
        assert (ours.scores(batch(ids_BT)) - want).abs().max() < 1e-5 * max(1.0, float(want.abs().max()))
    checkpoint.save_reward(ours, tmp_path / "ours", dtype=torch.float32)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = type(theirs).from_pretrained(
        tmp_path / "ours", attn_implementation=theirs.config._attn_implementation, dtype=torch.float32
    )
    again.config.pad_token_id = 0
    with torch.no_grad():
        assert torch.allclose(again.eval()(input_ids=ids_BT).logits[:, 0], want, atol=1e-6)


def writers() -> list[tuple[str, tiny.Case]]:
    """Every decoder's first case, with a class or without."""
    found: dict[str, tiny.Case] = {}
    for name, case in tiny.cases():
        if not hasattr(families.find(name), "POOL") and case.load is None:
            found.setdefault(name, case)
    return list(found.items())


@pytest.mark.parametrize(("name", "case"), writers(), ids=[name for name, _ in writers()])
def test_a_new_reward_model_is_read_again(name: str, case: tiny.Case, tmp_path: Path) -> None:
    """A head's own bias, its norms, heads for other tasks: no part of the head of words is left."""
    source = tmp_path / "source"
    if case.hf is not None:
        case.hf().save_pretrained(source)
        (case.disguise or id)(source)
    else:
        assert case.config and case.tensors
        source.mkdir()
        (source / "config.json").write_text(json.dumps(case.config))
        save_file(case.tensors(), source / "model.safetensors", metadata={"format": "pt"})
    model = reward.fresh(checkpoint.load_model(source), 0).eval()
    checkpoint.save_reward(model, tmp_path / "judge", dtype=torch.float32)
    again = checkpoint.load_reward(tmp_path / "judge").eval()
    ids_BT = (case.ids or tiny.ids)()
    with torch.no_grad():
        assert torch.equal(again.scores(batch(ids_BT)), model.scores(batch(ids_BT)))


@pytest.mark.parametrize("name", decoders())
def test_a_model_saved_without_its_head(name: str, tmp_path: Path) -> None:
    """AutoModel's files lack the prefix and the head: read when the head is the embedding, refused else."""
    whole = first(name)
    whole.base_model.save_pretrained(tmp_path)
    if not whole.config.tie_word_embeddings:
        with pytest.raises(UserError, match="is missing"):
            checkpoint.load_model(tmp_path)
        return
    model = checkpoint.load_model(tmp_path)
    ids_BT = tiny.ids()
    with torch.no_grad():
        want = whole(input_ids=ids_BT, use_cache=False).logits
        flat = batch(ids_BT)
        got = model.logits(model(flat.ids_N, flat.pos_N, Segments(flat.lengths)))
    assert (got.view(want.shape) - want).abs().max() / want.std() < tiny.TOLERANCE
    checkpoint.save_model(model, tmp_path / "again", dtype=torch.float32)
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path, tmp_path / "again"))
    assert before.keys() == after.keys()
