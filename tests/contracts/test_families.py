"""Every file in model/families keeps the family contract; a new family is found by itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from caravan.model import checkpoint, families, rules, sizes
from caravan.model.decoder import Decoder
from caravan.types import UserError

SMALL: dict[str, Any] = {
    # the union of both spellings: every family reads the keys it knows
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


@pytest.fixture(params=families.names())
def family(request: pytest.FixtureRequest) -> ModuleType:
    return families.find(request.param)


def name(family: ModuleType) -> str:
    return family.__name__.rsplit(".", 1)[-1]


def test_there_are_families() -> None:
    assert {"llama", "qwen2", "gpt2"} <= set(families.names())
    with pytest.raises(UserError, match="lama"):
        families.find("lama")


def test_config_and_spec_are_inverse(family: ModuleType) -> None:
    spec = family.spec(SMALL)
    config = json.loads(json.dumps(family.config(spec)))
    assert family.spec(config) == spec
    assert family.config(family.spec(config)) == family.config(spec)


def test_tied_and_untied(family: ModuleType) -> None:
    for tie in (True, False):
        assert family.spec({**SMALL, "tie_word_embeddings": tie}).tie is tie


def test_rules_cover_the_model_and_undo_themselves(family: ModuleType) -> None:
    spec = family.spec(SMALL)
    model = sizes.fresh(spec, seed=0, family=name(family))
    exported = checkpoint.export_tensors(model)
    table = rules.parse(family.RULES)
    shapes = {key: p.shape for key, p in Decoder(spec).named_parameters()}
    loaded, bare = rules.load(
        table, rules.plan(table, spec, shapes), exported.keys(), exported.__getitem__, "memory"
    )
    assert not bare
    for key, p in model.named_parameters():
        assert torch.equal(loaded[key], p), key


def test_folder_round_trip(family: ModuleType, tmp_path: Path) -> None:
    model = sizes.fresh(family.spec(SMALL), seed=0, family=name(family))
    checkpoint.save_model(model, tmp_path, dtype=torch.float32)
    again = checkpoint.load_model(tmp_path)
    assert again.spec == model.spec and again.family == name(family)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [family.ARCHITECTURE]


def test_a_missing_number_is_named(family: ModuleType) -> None:
    with pytest.raises(UserError, match=r"config\.json has no '(vocab_size|hidden_size|n_embd)'"):
        family.spec({})


def test_an_unknown_activation_is_named(family: ModuleType) -> None:
    with pytest.raises(UserError, match="swoosh"):
        family.spec({**SMALL, "hidden_act": "swoosh", "activation_function": "swoosh"})


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
        assert [layer.attn.window for layer in spec.layers] == want, (reader, config)
        assert spec.context == (16 if 16 in want else 32)


def test_both_generations_of_rope_keys_are_written() -> None:
    llama = families.find("llama")
    stretched = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    config = llama.config(llama.spec(SMALL | stretched))
    assert config["rope_theta"] == 5e5 and config["rope_scaling"] == stretched["rope_scaling"]
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
