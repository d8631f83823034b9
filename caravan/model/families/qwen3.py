"""Qwen 3 (dense): Llama with an RMS norm on every query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model.families import llama, qwen2
from caravan.model.spec import Spec

ARCHITECTURE = "Qwen3ForCausalLM"
CLASSIFIER = "Qwen3ForSequenceClassification"
CHECKPOINTS = ("Qwen/Qwen3-*",)
RULES = llama.RULES


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec."""
    bias = bool(config.get("attention_bias", False))
    base = qwen2.spec({"head_dim": 128, **config})
    norm = base.final_norm
    return llama.with_attention(base, lambda i, attn: replace(attn, qkv_bias=bias, o_bias=bias, qk_norm=norm))


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    return {**qwen2.config(value), "attention_bias": value.layers[0].attn.qkv_bias}
