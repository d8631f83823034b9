"""Qwen 1.5, 2 and 2.5: Llama with biases on q, k and v, and an optional window in the upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model.families import llama
from caravan.model.spec import Spec

ARCHITECTURE = "Qwen2ForCausalLM"
CLASSIFIER = "Qwen2ForSequenceClassification"
RULES = llama.RULES


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec; layers from `max_window_layers` up are windowed if `use_sliding_window`."""
    base = llama.spec({**config, "attention_bias": False, "mlp_bias": False})
    kinds = config.get("layer_types")
    size = config.get("sliding_window") if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)

    def windowed(index: int) -> bool:
        return kinds[index] == "sliding_attention" if kinds else index >= first

    return llama.with_attention(
        base, lambda i, attn: replace(attn, qkv_bias=True, window=size if size and windowed(i) else None)
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = llama.config(value)
    del result["attention_bias"], result["mlp_bias"]
    windows = [layer.attn.window for layer in value.layers]
    size = next((w for w in windows if w), None)
    result["use_sliding_window"] = size is not None
    if size is not None:
        result["sliding_window"] = size
        result["max_window_layers"] = windows.index(size)
    result["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    return result
