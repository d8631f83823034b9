"""AFM-4.5B (Arcee 2025): Llama with a plain FFN of squared ReLUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model.families import llama
from caravan.model.spec import FFN, Spec

ARCHITECTURE = "ArceeForCausalLM"
CLASSIFIER = "ArceeForSequenceClassification"
CHECKPOINTS = ("arcee-ai/AFM-4.5B*",)
RULES = """
table arcee like llama
@.mlp.up_proj -> ffn.inp
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec."""
    value = llama.spec({"hidden_act": "relu2", "rms_norm_eps": 1e-5, **config})
    ffn = replace(value.layers[0].ffn or FFN(kind="mlp", d_ff=1, act="relu2"), kind="mlp")
    return llama.with_layers(value, ffn=ffn)


config = llama.config
