"""Qwen 1.5, 2 and 2.5: Llama with biases on q, k and v, and an optional window in the upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import llama
from caravan.model.spec import Spec

ARCHITECTURE = "Qwen2ForCausalLM"
CLASSIFIER = "Qwen2ForSequenceClassification"
CHECKPOINTS = ("Qwen/Qwen1.5-*", "Qwen/Qwen2-*", "Qwen/Qwen2.5-*")
RULES = llama.RULES


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec; layers from `max_window_layers` up are windowed if `use_sliding_window`."""
    base = llama.spec({**config, "attention_bias": False, "mlp_bias": False})
    size = llama.window(config, 4096) if keys.flag(config, "use_sliding_window", default=False) else None
    # 0 is a fine value here
    first = config["max_window_layers"] if config.get("max_window_layers") is not None else 28
    slides = llama.layer_kinds(config, len(base.layers), lambda i: i >= first)
    return llama.with_attention(
        base, lambda i, attn: replace(attn, qkv_bias=True, window=size if slides[i] else None)
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = llama.config(value)
    del result["attention_bias"], result["mlp_bias"]
    windows = [attn.window for attn in value.attns]
    size = next((w for w in windows if w), None)
    result["use_sliding_window"] = size is not None
    if size is not None:
        result["sliding_window"] = size
        result["max_window_layers"] = windows.index(size)
    result["layer_types"] = llama.written_kinds(value)
    return result
