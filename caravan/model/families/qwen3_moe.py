"""Qwen3-MoE (Qwen Team 2025, arXiv:2505.09388): experts without a shared one, queries and keys normalised per
head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import llama
from caravan.model.families.mixtral import with_experts
from caravan.model.families.qwen2_moe import expert_config, experts, sparse
from caravan.model.spec import Spec

ARCHITECTURE = "Qwen3MoeForCausalLM"
CLASSIFIER = "Qwen3MoeForSequenceClassification"
CHECKPOINTS = ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-235B-A22B")

RULES = """
table qwen3_moe like olmoe
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    keys.refuse(config, "mlp_bias", False)
    base = llama.spec({"num_key_value_heads": 4, **config})
    windowed = keys.flag(config, "use_sliding_window", default=False)
    window = llama.window(config, 4096) if windowed else None
    norm = base.layers[0].norm
    base = llama.with_attention(base, lambda i, attn: replace(attn, qk_norm=norm, window=window))
    moe = experts(config, default=128, top_k=8)
    return with_experts(base, lambda i: moe if sparse(config, i) else None)


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = llama.config(value)
    del result["mlp_bias"]
    window = value.attns[0].window
    return {
        **result,
        **expert_config(value),
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }
