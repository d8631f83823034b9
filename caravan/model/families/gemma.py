"""Gemma 1 (Gemma Team 2024, arXiv:2403.08295): Llama with gains 1 + w, wide heads, tanh-GELU gates, and
embeddings times the square root of the width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import llama
from caravan.model.spec import Norm, Spec

ARCHITECTURE = "GemmaForCausalLM"
CLASSIFIER = "GemmaForSequenceClassification"
CHECKPOINTS = ("google/gemma-2b", "google/gemma-7b", "google/codegemma-*")
RULES = llama.RULES


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. The first releases say "gelu" and mean the tanh approximation, which a null or
    missing `hidden_activation` beside it confirms."""
    act = config.get("hidden_activation") or config.get("hidden_act") or "gelu"
    return base({**config, "hidden_act": "gelu_new" if act == "gelu" else act})


def base(config: Mapping[str, Any]) -> Spec:
    """What the three generations share."""
    keys.refuse(config, "use_bidirectional_attention", False)
    value = llama.spec({"head_dim": 256, "tie_word_embeddings": True, **config, "mlp_bias": False})
    norm = replace(value.final_norm or Norm(), unit_offset=True, gain_fp32=True)
    return replace(llama.with_norm(value, norm), embed_scale=value.d**0.5)


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = llama.config(value)
    del result["mlp_bias"]
    return {**result, "hidden_activation": result["hidden_act"]}
