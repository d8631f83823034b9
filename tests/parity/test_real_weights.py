"""Trained weights: the known greedy answer of a 260 K Llama, and what may be done to it before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from caravan.engine.engine import Engine
from caravan.model import checkpoint
from caravan.model.decoder import Decoder
from caravan.types import Sampling


@pytest.fixture
def source(kit: Path) -> Path:
    return kit / "model" / "stories260k_hf"


@pytest.fixture
def want(kit: Path) -> list[int]:
    return json.loads((kit / "model" / "greedy_first_32.json").read_text())["ids"]


def greedy(model: Decoder, count: int) -> list[int]:
    sampling = Sampling(temperature=0, max_tokens=count - 1)
    return [1, *Engine(model).generate([[1]], sampling)[0][0].ids]


def test_the_answer_is_the_known_one(source: Path, want: list[int]) -> None:
    assert greedy(checkpoint.load_model(source), len(want)) == want


def test_also_after_our_export_twice_over(source: Path, want: list[int], tmp_path: Path) -> None:
    model = checkpoint.load_model(source)
    checkpoint.save_model(model, tmp_path / "a", source, torch.float32)
    again = checkpoint.load_model(tmp_path / "a")
    checkpoint.save_model(again, tmp_path / "b", source, torch.float32)
    assert greedy(checkpoint.load_model(tmp_path / "b"), len(want)) == want
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    first, second = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert first == second


def test_also_from_shards(source: Path, want: list[int], tmp_path: Path) -> None:
    tensors = checkpoint.export_tensors(checkpoint.load_model(source))
    checkpoint.write_tensors(tensors, tmp_path, shard_bytes=100_000)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert greedy(checkpoint.load_model(tmp_path), len(want)) == want


def test_transformers_says_the_same_of_our_export(source: Path, want: list[int], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    checkpoint.save_model(checkpoint.load_model(source), tmp_path, source, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = theirs.generate(torch.tensor([want[:1]]), max_length=len(want), do_sample=False, eos_token_id=None)
    assert ids[0].tolist() == want


@pytest.mark.parametrize("bits", [8])
def test_also_in_integers(source: Path, want: list[int], tmp_path: Path, bits: int) -> None:
    from caravan.compress import folder

    model = folder.load_source(source)
    grid = folder.Grid(bits, 0, torch.float32)
    weights = folder.round_to_nearest(model, grid, lambda done, total: None)
    folder.write(source, tmp_path, model, grid, weights)
    assert greedy(checkpoint.load_model(tmp_path), len(want)) == want
