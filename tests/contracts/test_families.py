"""Every file in model/families keeps the family contract; a new family is found by itself. That it computes
the right thing is shown by its cases (test_family_parity.py)."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from caravan.model import checkpoint, families, rules, sizes
from caravan.types import UserError

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "sliding_window": 16,
    "n_embd": 24,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 32,
}
PLAIN = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
"""Families that can be trained from scratch with the keys above."""


@pytest.fixture(params=families.names())
def family(request: pytest.FixtureRequest) -> ModuleType:
    return families.find(request.param)


def name(family: ModuleType) -> str:
    return family.__name__.rsplit(".", 1)[-1]


def test_there_are_families() -> None:
    assert {"llama", "qwen2", "gpt2"} <= set(families.names())
    with pytest.raises(UserError, match="lama"):
        families.find("lama")


def test_a_family_says_what_it_is(family: ModuleType) -> None:
    assert family.__doc__ and isinstance(family.ARCHITECTURE, str)
    assert family.CLASSIFIER is None or isinstance(family.CLASSIFIER, str)
    assert rules.of(family).rules and callable(family.spec) and callable(family.config)


def test_model_types_lead_to_one_family(family: ModuleType) -> None:
    if families.model_type(family) not in families.names():  # else it is written as another family's
        assert families.find(families.model_type(family)) is family
    for alias in getattr(family, "ALIASES", ()):
        assert families.find(alias) is family
        assert alias.replace("-", "_") not in families.names(), f"{alias} is a file of its own"
    everything = [a for other in families.names() for a in getattr(families.find(other), "ALIASES", ())]
    assert len(everything) == len(set(everything))


def test_a_missing_number_is_named(family: ModuleType) -> None:
    with pytest.raises(UserError, match=r"config\.json has no '\w+'"):
        family.spec({})


@pytest.mark.parametrize("plain", PLAIN)
def test_an_unknown_activation_is_named(plain: str) -> None:
    with pytest.raises(UserError, match="swoosh"):
        families.find(plain).spec({**SMALL, "hidden_act": "swoosh", "activation_function": "swoosh"})


@pytest.mark.parametrize("plain", PLAIN)
def test_tied_and_untied(plain: str) -> None:
    for tie in (True, False):
        assert families.find(plain).spec({**SMALL, "tie_word_embeddings": tie}).tie is tie


@pytest.mark.parametrize("plain", PLAIN)
def test_fresh_models_of_a_family_survive_their_folder(plain: str, tmp_path: Path) -> None:
    family = families.find(plain)
    model = sizes.fresh(family.spec(SMALL), seed=0, family=plain)
    checkpoint.save_model(model, tmp_path, dtype=torch.float32)
    again = checkpoint.load_model(tmp_path)
    assert again.spec == model.spec and again.family == plain
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [family.ARCHITECTURE]


def test_an_alias_is_written_as_what_it_is(tmp_path: Path) -> None:
    config = {**SMALL, "model_type": "aquila", "auto_map": {"AutoModel": "modeling_aquila.Aquila"}}
    model = sizes.fresh(families.find("aquila").spec(config), seed=0, family="aquila")
    model.config = config
    checkpoint.save_model(model, tmp_path, dtype=torch.float32)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "llama" and "auto_map" not in written
    assert checkpoint.load_model(tmp_path).spec == model.spec


def test_windows_are_read_where_the_family_puts_them() -> None:
    windows = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    for reader, config, want in (
        ("mistral", {}, [16, 16]),
        ("mistral", {"sliding_window": None}, [None, None]),
        ("qwen2", {}, [None, None]),
        ("qwen2", windows, [None, 16]),
        ("qwen2", windows | {"layer_types": ["sliding_attention", "full_attention"]}, [16, None]),
    ):
        spec = families.find(reader).spec(SMALL | config)
        assert [attn.window for attn in spec.attns] == want, (reader, config)
        assert spec.context == 32


def test_both_generations_of_rope_keys_are_written() -> None:
    llama = families.find("llama")
    stretched = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    config = llama.config(llama.spec(SMALL | stretched))
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {**stretched["rope_scaling"], "type": "linear"}
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear"},
        {"rope_type": "spiral", "factor": 2.0},
        {"rope_type": "linear", "factor": "four"},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0, 2.0, 3.0]},
        {"rope_type": "yarn", "factor": 0.0},
    ],
)
def test_a_stretch_that_makes_no_sense_is_an_error(scaling: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        families.find("llama").spec(SMALL | {"rope_scaling": scaling})
