"""Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama with a sliding window in version 0.1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model.families import llama
from caravan.model.spec import Spec

ARCHITECTURE = "MistralForCausalLM"
CLASSIFIER = "MistralForSequenceClassification"
CHECKPOINTS = ("mistralai/Mistral-7B-v0.1..v0.3", "HuggingFaceH4/zephyr-7b-*")
RULES = llama.RULES


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec; a missing `sliding_window` means 4096, null means none."""
    window = llama.window(config, 4096)
    base = llama.spec({"num_key_value_heads": 8, **config, "attention_bias": False, "mlp_bias": False})
    return llama.with_attention(base, lambda i, attn: replace(attn, window=window))


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = llama.config(value)
    del result["attention_bias"], result["mlp_bias"]
    return {**result, "sliding_window": value.layers[0].attn.window}
