"""Adapters of the GPT line: what config.json may say, and how each complains about what it may not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from caravan.model import families, keys
from caravan.model.spec import Spec
from caravan.types import UserError

SIZES: dict[str, tuple[str, str, str, str]] = {
    # width, heads, layers, inner width
    "gpt_neo": ("hidden_size", "num_heads", "num_layers", "intermediate_size"),
    "gptj": ("n_embd", "n_head", "n_layer", "n_inner"),
    "codegen": ("n_embd", "n_head", "n_layer", "n_inner"),
    "gpt_neox": ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"),
    "opt": ("hidden_size", "num_attention_heads", "num_hidden_layers", "ffn_dim"),
    "bloom": ("n_embed", "n_head", "n_layer", ""),
    "falcon": ("hidden_size", "num_attention_heads", "num_hidden_layers", "ffn_hidden_size"),
    "mpt": ("d_model", "n_heads", "n_layers", ""),
    "phi": ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"),
    "persimmon": ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"),
    "stablelm": ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"),
    "gpt_bigcode": ("n_embd", "n_head", "n_layer", "n_inner"),
    "xglm": ("d_model", "attention_heads", "num_layers", "ffn_dim"),
    "openai_gpt": ("n_embd", "n_head", "n_layer", ""),
}
ACTIVATION = {
    "gpt_neo": "activation_function",
    "gptj": "activation_function",
    "codegen": "activation_function",
    "gpt_neox": "hidden_act",
    "opt": "activation_function",
    "falcon": "activation",
    "phi": "hidden_act",
    "persimmon": "hidden_act",
    "stablelm": "hidden_act",
    "gpt_bigcode": "activation_function",
    "xglm": "activation_function",
    "openai_gpt": "afn",
}
FLAGS = {
    "gpt_neox": ("attention_bias", "use_parallel_residual"),
    "opt": (
        "do_layer_norm_before",
        "enable_bias",
        "layer_norm_elementwise_affine",
        "_remove_final_layer_norm",
    ),
    "bloom": ("apply_residual_connection_post_layernorm",),
    "falcon": ("alibi", "bias", "multi_query", "new_decoder_architecture", "parallel_attn"),
    "phi": ("qk_layernorm",),
    "persimmon": ("qk_layernorm",),
    "stablelm": ("qk_layernorm", "use_qkv_bias", "use_parallel_residual"),
    "gpt_bigcode": ("multi_query", "scale_attn_weights"),
    "xglm": ("scale_embedding",),
}
EPSILON = dict.fromkeys(SIZES, "layer_norm_epsilon") | {
    "gpt_neox": "layer_norm_eps",
    "phi": "layer_norm_eps",
    "persimmon": "layer_norm_eps",
    "stablelm": "layer_norm_eps",
}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt_neo", {"attention_types": [[["global", "somewhere"], 2]]}, "attention_types"),
    ("gpt_neo", {"attention_types": [[["global"], 3]]}, "attention_types"),
    ("gpt_neo", {"attention_types": 7}, "attention_types"),
    ("gpt_neo", {"attention_types": [[["global"], 10**12]]}, "attention_types"),
    ("gpt_neo", {"attention_layers": ["global", "local"]}, "attention_layers"),
    ("gpt_neo", {"window_size": 0}, "window_size"),
    ("gptj", {"rotary_dim": 99}, "rotary_dim"),
    ("gptj", {"rotary_dim": 3}, "rotary_dim"),
    ("codegen", {"n_head": 6}, "n_head"),
    ("gptj", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("codegen", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("phi", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("gpt_neox", {"rotary_pct": 1.5}, "rotary_pct"),
    ("gpt_neox", {"rotary_pct": "half"}, "rotary_pct"),
    ("gpt_neox", {"rotary_pct": 0.1}, "rotary_pct"),
    ("gpt_neox", {"rope_parameters": [1]}, "rope_parameters"),
    ("gpt_neox", {"rope_scaling": {"type": "spiral", "factor": 2.0}}, "spiral"),
    ("opt", {"word_embed_proj_dim": "512"}, "word_embed_proj_dim"),
    ("bloom", {"n_inner": 10}, "n_inner"),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 3}, "num_kv_heads"),
    ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn"),
    ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn"),
    ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
    ("mpt", {"attn_config": {"alibi": False}}, "alibi"),
    ("mpt", {"attn_config": {"qk_ln": True}}, "qk_ln"),
    ("mpt", {"attn_config": {"prefix_lm": True}}, "prefix_lm"),
    ("mpt", {"attn_config": {"alibi_bias_max": 16}}, "alibi_bias_max"),
    ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}, "attn_type"),
    ("mpt", {"attn_config": {"clip_qkv": "hard"}}, "clip_qkv"),
    ("mpt", {"attn_config": {"clip_qkv": -1.0}}, "clip_qkv"),
    ("mpt", {"attn_config": {"softmax_scale": 0.0}}, "softmax_scale"),
    ("mpt", {"attn_config": 3}, "attn_config"),
    ("gpt_neox", {"rotary_emb_base": 0}, "rotary_emb_base"),
    ("mpt", {"no_bias": False}, "no_bias"),
    ("mpt", {"logit_scale": 0.5}, "logit_scale"),
    ("mpt", {"expansion_ratio": 3}, "expansion_ratio"),
    ("mpt", {"norm_type": "rmsnorm"}, "norm_type"),
    ("phi", {"num_key_value_heads": 3}, "num_key_value_heads"),
    ("phi", {"partial_rotary_factor": 0}, "partial_rotary_factor"),
    ("stablelm", {"num_key_value_heads": 3}, "num_key_value_heads"),
    ("gpt_bigcode", {"add_cross_attention": True}, "add_cross_attention"),
    ("xglm", {"add_cross_attention": True}, "add_cross_attention"),
]


def minimal(name: str, **more: Any) -> dict[str, Any]:
    """The least a config.json must say: everything else has the default of the family's class."""
    d, heads, layers, inner = SIZES[name]
    config: dict[str, Any] = {"vocab_size": 61, d: 64, heads: 8, layers: 4}
    if inner:
        config[inner] = 40
    if name == "gpt_neo":
        config["attention_types"] = [[["global", "local"], 2]]
    if name in ("gptj", "codegen"):
        config["rotary_dim"] = 4
    return config | more


def read(name: str, config: dict[str, Any]) -> Spec:
    return families.find(name).spec(json.loads(json.dumps(config)))


@pytest.mark.parametrize("name", SIZES)
def test_sizes_have_no_default(name: str) -> None:
    optional = {"n_inner", "ffn_hidden_size", "attention_types", "rotary_dim"}
    optional |= {"intermediate_size"} if name == "gpt_neo" else set()
    for key in set(minimal(name)) - optional:
        config = minimal(name)
        del config[key]
        with pytest.raises(UserError, match=f"'{key}'"):
            read(name, config)


@pytest.mark.parametrize("name", SIZES)
def test_a_size_of_the_wrong_type_is_named(name: str) -> None:
    for key in [k for k in (*SIZES[name], "vocab_size") if k]:
        for value in ("64", -1, 0, 2.5, True, [64], {}):
            with pytest.raises(UserError, match=f"'{key}'"):
                read(name, minimal(name, **{key: value}))


@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_would_fill_the_memory_are_refused(name: str) -> None:
    for key, value in ((SIZES[name][2], 10**9), (SIZES[name][0], 2**40), ("vocab_size", 2**40)):
        with pytest.raises(UserError, match=f"'{key}'"):
            read(name, minimal(name, **{key: value}))


@pytest.mark.parametrize("name", sorted(set(SIZES) - {"opt", "xglm"}))
def test_an_epsilon_is_above_zero(name: str) -> None:
    for value in (0, -1e-5, "small", True):
        with pytest.raises(UserError, match=f"'{EPSILON[name]}'"):
            read(name, minimal(name, **{EPSILON[name]: value}))


@pytest.mark.parametrize("name", SIZES)
def test_heads_divide_the_width(name: str) -> None:
    heads = SIZES[name][1]
    with pytest.raises(UserError, match=f"'{heads}'"):
        read(name, minimal(name, **{heads: 12}))


@pytest.mark.parametrize("name", ACTIVATION)
def test_an_unknown_activation_is_named(name: str) -> None:
    for value in ("swoosh", 3, ["gelu"]):
        with pytest.raises(UserError, match=f"'{ACTIVATION[name]}'"):
            read(name, minimal(name, **{ACTIVATION[name]: value}))


@pytest.mark.parametrize("name", SIZES)
def test_a_switch_is_true_or_false(name: str) -> None:
    for key in (*FLAGS.get(name, ()), "tie_word_embeddings"):
        for value in ("yes", 1, 0.0):
            with pytest.raises(UserError, match=f"'{key}'"):
                read(name, minimal(name, **{key: value}))


@pytest.mark.parametrize(("name", "change", "key"), REFUSED)
def test_what_we_do_not_have_is_refused(name: str, change: dict[str, Any], key: str) -> None:
    read(name, minimal(name))
    with pytest.raises(UserError, match=f"'{key}'"):
        read(name, minimal(name, **change))


@pytest.mark.parametrize("name", SIZES)
def test_every_switch_survives_the_way_there_and_back(name: str) -> None:
    family = families.find(name)
    settled: set[tuple[bool, ...]] = set()
    switches = FLAGS.get(name, ())
    for bits in range(2 ** len(switches)):
        choice = {key: bool(bits >> i & 1) for i, key in enumerate(switches)}
        try:
            spec = read(name, minimal(name, **choice))
        except UserError:
            assert name == "falcon" and choice["new_decoder_architecture"] and not choice["parallel_attn"]
            continue
        config = json.loads(json.dumps(family.config(spec)))
        assert family.spec(config) == spec, choice
        assert family.config(family.spec(config)) == config
        settled.add(tuple(choice.values()))
    assert len(settled) == (2 ** len(switches) * 3 // 4 if name == "falcon" else 2 ** len(switches))


def test_null_means_the_default() -> None:
    for name in SIZES:
        config = minimal(name)
        defaults = {k: None for k in families.find(name).config(read(name, config)) if k not in config}
        assert read(name, config | defaults) == read(name, config)


def test_the_first_releases_of_falcon_and_stablelm() -> None:
    old = {"vocab_size": 61, "hidden_size": 64, "n_head": 8, "n_layer": 4, "n_head_kv": 2, "bias": False}
    big = read("falcon", {**old, "model_type": "RefinedWeb", "parallel_attn": True})
    new = {"new_decoder_architecture": True, "num_kv_heads": 2}
    assert big == read("falcon", {**minimal("falcon"), "ffn_hidden_size": None, **new})
    small = {**old, "model_type": "RefinedWebModel", "multi_query": True}
    assert read("falcon", small) == read("falcon", {**minimal("falcon"), "ffn_hidden_size": None})
    epoch = minimal("stablelm", norm_eps=1e-4, rope_pct=0.5)
    assert read("stablelm", epoch) == read(
        "stablelm", minimal("stablelm", layer_norm_eps=1e-4, partial_rotary_factor=0.5)
    )


def test_rotary_keys_of_both_generations_say_the_same() -> None:
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4, "partial_rotary_factor": 0.5}
    stretch = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    plain = {"rope_theta": 5e4, "partial_rotary_factor": 0.5}
    for name, old in (
        ("gpt_neox", {"rotary_emb_base": 50_000, "rotary_pct": 0.5}),
        ("gpt_neox", plain),
        ("phi", plain),
        ("persimmon", plain),
        ("stablelm", plain),
        ("falcon", plain),
    ):
        spec = read(name, minimal(name, rope_parameters=new))
        assert spec.layers[0].attn.rope.dim == 4 and spec.layers[0].attn.rope.theta == 5e4
        assert read(name, minimal(name, **old, **stretch)) == spec
        assert read(name, minimal(name, **old)) != spec


def test_shares_have_the_defaults_of_the_classes() -> None:
    wanted = {"gpt_neox": 2, "phi": 4, "persimmon": 4, "stablelm": 2, "falcon": 8}
    assert {name: read(name, minimal(name)).layers[0].attn.rope.dim for name in wanted} == wanted


def test_bloom_reads_the_spelling_of_its_release() -> None:
    release = {"vocab_size": 61, "n_embed": 64, "num_attention_heads": 8, "n_layer": 4, "n_inner": None}
    assert read("bloom", release) == read("bloom", minimal("bloom"))


def test_shares_of_a_head_come_back_whole() -> None:
    for width in range(2, 257):
        for dim in range(2, width + 1):
            assert int(width * keys.share(dim, width)) == dim
