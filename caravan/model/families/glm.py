"""GLM-4-9B (GLM Team 2024, arXiv:2406.12793): Llama with biases on q, k and v, one fused gate and up
projection, and half of each head rotated in interleaved pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model.families import llama
from caravan.model.spec import Spec

ARCHITECTURE = "GlmForCausalLM"
CLASSIFIER = "GlmForSequenceClassification"
CHECKPOINTS = ("THUDM/glm-4-9b-hf", "THUDM/glm-4-9b-chat-hf", "THUDM/glm-edge-*")
RULES = """
table glm like llama
@.self_attn.{q,k,v}_proj -> mix.qkv : cat rope; @.mlp.gate_up_proj -> ffn.inp
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec; `attention_bias` is about q, k and v only."""
    full = {"rms_norm_eps": 1.5625e-7, "num_key_value_heads": 2, "head_dim": 128, "attention_bias": True,
            "max_position_embeddings": 131_072, **config, "mlp_bias": False}  # fmt: skip
    value = llama.with_attention(llama.spec(full, share=0.5), lambda i, attn: replace(attn, o_bias=False))
    return llama.with_rope(value, interleaved=True)


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = llama.config(value)
    del result["mlp_bias"]
    attn = value.layers[0].attn
    return {**result, **llama.rope_config(attn.rope, attn.head_dim)}
