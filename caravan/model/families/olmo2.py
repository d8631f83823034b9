"""OLMo 2 (OLMo Team 2025, arXiv:2501.00656): Llama with norms after each sublayer instead of before it, and
one RMS norm over all queries and one over all keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model.families import llama
from caravan.model.spec import Norm, Spec

ARCHITECTURE = "Olmo2ForCausalLM"
CLASSIFIER = "Olmo2ForSequenceClassification"
CHECKPOINTS = ("allenai/OLMo-2-0425-1B", "allenai/OLMo-2-1124-7B", "allenai/OLMo-2-1124-13B")
RULES = """
table olmo2 like llama
- n1; - n2; @.post_{attention,feedforward}_layernorm -> {p1,p2}
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec."""
    value = llama.spec({"rms_norm_eps": 1e-5, **config, "mlp_bias": False})
    norm = replace(value.final_norm or Norm(), gain_fp32=True)
    value = llama.with_layers(llama.with_norm(value, norm), pre=False, post="out")
    value = llama.with_attention(value, lambda i, attn: replace(attn, qk_norm=norm, qk_norm_over="full"))
    return llama.with_rope(value, fp32=True)


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = llama.config(value)
    del result["mlp_bias"]
    return result
