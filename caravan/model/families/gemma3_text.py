"""Gemma 3, text (Gemma Team 2025, arXiv:2503.19786): Gemma 2 without caps, with norms on queries and keys,
five windowed layers with a rotary base of their own between two global ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import gemma2, llama
from caravan.model.spec import Spec

ARCHITECTURE = "Gemma3ForCausalLM"
CLASSIFIER = "Gemma3TextForSequenceClassification"
CHECKPOINTS = ("google/gemma-3-270m", "google/gemma-3-1b-*")
RULES = gemma2.RULES


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Older files say `rope_theta`, `rope_local_base_freq` and
    `sliding_window_pattern`, newer ones `rope_parameters` and `layer_types` per kind of layer."""
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    ropes = {kind: _rope_keys(config, kind) for kind in ("full_attention", "sliding_attention")}
    plain = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling")}
    full = {"sliding_window": 4096, "max_position_embeddings": 131_072, **plain}
    value = gemma2.sandwich(full, lambda i: (i + 1) % pattern != 0)
    slides = llama.layer_kinds(config, len(value.layers), lambda i: (i + 1) % pattern != 0)
    turned = {
        kind: llama.rope({**full, "rope_parameters": said}, value.layers[0].attn.head_dim)
        for kind, said in ropes.items()
    }
    return llama.with_attention(
        value,
        lambda i, attn: replace(
            attn,
            qk_norm=value.final_norm,
            rope=turned["sliding_attention" if slides[i] else "full_attention"],
        ),
    )


def _rope_keys(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The rope_parameters of one kind of layer, from either generation of keys."""
    local = kind == "sliding_attention"
    said = dict(keys.table(keys.table(config, "rope_parameters"), kind))
    if not said and not local:
        said = dict(keys.table(config, "rope_scaling"))
    name, theta = ("rope_local_base_freq", 1e4) if local else ("rope_theta", 1e6)
    return {"rope_theta": keys.real(config, name, default=theta), **said}


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = gemma2.config(value)
    kinds = llama.written_kinds(value)
    ropes = {}
    for kind, attn in zip(kinds, value.attns, strict=True):
        ropes[kind] = llama.rope_config(attn.rope)
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        result.pop(name)
    if "full_attention" in ropes:
        result |= {name: ropes["full_attention"][name] for name in ("rope_theta", "rope_scaling")}
    if "sliding_attention" in ropes:
        result["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
    return {**result, "rope_parameters": {kind: said["rope_parameters"] for kind, said in ropes.items()}}
