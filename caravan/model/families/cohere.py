"""Command R and R+, Aya (Cohere 2024): attention and FFN side by side on one layer norm without bias,
interleaved rotary pairs, tied head with a scale; R+ has a gain for every query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import llama
from caravan.model.spec import Norm, Spec

ARCHITECTURE = "CohereForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("CohereForAI/c4ai-command-r-v01", "CohereForAI/c4ai-command-r-plus", "CohereForAI/aya-23-*")
RULES = """
table cohere like llama
- n2; @.self_attn.{q,k,v}_proj -> mix.qkv : cat rope; @.self_attn.{q,k}_norm -> mix.{qn,kn} : rope
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec."""
    value = llama.spec(
        {"max_position_embeddings": 8192, "tie_word_embeddings": True, **config, "mlp_bias": False}
    )
    norm = Norm(kind="layer", eps=keys.real(config, "layer_norm_eps", default=1e-5), gain_fp32=True)
    value = llama.with_layers(llama.with_norm(value, norm), parallel=True, shared_norm=True)
    heads = norm if keys.flag(config, "use_qk_norm", default=False) else None
    value = llama.with_attention(value, lambda i, attn: replace(attn, qk_norm=heads, qk_norm_over="per_head"))
    value = llama.with_rope(value, interleaved=True, fp32=True)
    return replace(value, logit_scale=keys.real(config, "logit_scale", default=0.0625))


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = llama.config(value)
    del result["mlp_bias"], result["rms_norm_eps"]
    layer = value.layers[0]
    return {
        **result,
        "layer_norm_eps": layer.norm.eps,
        "use_qk_norm": layer.attn.qk_norm is not None,
        "logit_scale": value.logit_scale,
    }
