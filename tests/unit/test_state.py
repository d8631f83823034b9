"""Checkpoints: bit-equal round trips, torn and half-written ones, a full disk."""

import math
import os

import pytest
import torch

from caravan.systems import state
from caravan.types import UserError


def tensors(value=1.0):
    return {"master": torch.full((5,), value), "half": torch.tensor([0.1, -3.0], dtype=torch.bfloat16)}


def test_round_trip_is_bit_equal_with_random_state(tmp_path):
    torch.manual_seed(3)
    scalars = {"loss": 0.1 + 0.2, "bad": [math.nan, math.inf], "list": [1, None, "x"]}
    state.save(tmp_path, 7, tensors(), scalars)
    drawn = torch.rand(3)
    torch.manual_seed(99)
    saved = state.load_latest(tmp_path)
    assert saved.step == 7 and saved.tensors.keys() == tensors().keys()
    assert all(
        torch.equal(saved.tensors[k], t) and saved.tensors[k].dtype == t.dtype for k, t in tensors().items()
    )
    assert saved.scalars["loss"] == 0.1 + 0.2 and math.isnan(saved.scalars["bad"][0])
    assert torch.equal(torch.rand(3), drawn)


def test_only_the_last_two_stay(tmp_path):
    for step in (3, 10, 200):
        state.save(tmp_path, step, tensors(step), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000200"]
    assert state.newest_step(tmp_path) == 200 and state.newest_step(tmp_path / "none") == -1
    assert state.load_latest(tmp_path, at_most=50).step == 10
    assert state.load_latest(tmp_path, at_most=5) is None


@pytest.mark.parametrize("damage", ["cut", "no json", "bad json", "garbage", "no tensors"])
def test_a_broken_checkpoint_is_named_and_passed_over(tmp_path, capsys, damage):
    state.save(tmp_path, 1, tensors(1.0), {})
    newest = state.save(tmp_path, 2, tensors(2.0), {})
    file, page = newest / "tensors.safetensors", newest / "state.json"
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 4)
    elif damage == "garbage":
        file.write_bytes(b"\xff" * file.stat().st_size)
    elif damage == "no tensors":
        file.unlink()
    elif damage == "no json":
        page.unlink()
    else:
        page.write_text('{"step": 2')
    saved = state.load_latest(tmp_path)
    assert saved.step == 1 and saved.tensors["master"][0] == 1.0
    assert "step-00000002 is broken" in capsys.readouterr().err


def test_saving_the_same_step_again_replaces_it(tmp_path):
    state.save(tmp_path, 4, tensors(1.0), {})
    (tmp_path / ".part-00000005-1").mkdir()  # left by a process that died
    state.save(tmp_path, 4, tensors(2.0), {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]
    assert state.load_latest(tmp_path).tensors["master"][0] == 2.0


def test_a_full_disk_is_a_sentence_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    state.save(tmp_path, 1, tensors(), {})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(UserError, match="checkpoint of step 2") as failure:
        state.save(tmp_path, 2, tensors(), {})
    assert "free some space" in failure.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
