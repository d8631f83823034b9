"""Phi-3 (Abdin et al. 2024, arXiv:2404.14219) and Phi-4-mini: Llama with fused projections, a window
(mini-4k) or two sets of stretched frequencies (128k)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import llama
from caravan.model.spec import Spec

ARCHITECTURE = "Phi3ForCausalLM"
CLASSIFIER = "Phi3ForSequenceClassification"
CHECKPOINTS = (
    "microsoft/Phi-3-mini-*",
    "microsoft/Phi-3-medium-*",
    "microsoft/Phi-3.5-mini-*",
    "microsoft/phi-4",
)
RULES = """
table phi3 like llama
@.self_attn.qkv_proj -> mix.qkv; @.mlp.gate_up_proj -> ffn.inp
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. The first releases call their stretch "su" or "yarn" and mean longrope."""
    said = dict(config)
    for name in ("rope_scaling", "rope_parameters"):
        values = dict(keys.table(config, name))
        for key in ("type", "rope_type"):
            if values.get(key) in ("su", "yarn"):
                values[key] = "longrope"
        said[name] = values
    value = llama.spec({"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, **said,
                        "attention_bias": False, "mlp_bias": False})  # fmt: skip
    window = llama.window(config)
    return llama.with_attention(value, lambda i, attn: replace(attn, window=window))


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = llama.config(value)
    del result["attention_bias"], result["mlp_bias"], result["head_dim"]
    attn = value.layers[0].attn
    if attn.rope and attn.rope.scaling and attn.rope.scaling.kind == "longrope":
        result["original_max_position_embeddings"] = attn.rope.scaling.original_context
    return {**result, "sliding_window": attn.window}
