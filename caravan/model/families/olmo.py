"""OLMo 1 (Groeneveld et al. 2024, arXiv:2402.00838): Llama with layer norms that have no parameters, rotation
in fp32 and an optional clip of queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import llama
from caravan.model.spec import Norm, Spec

ARCHITECTURE = "OlmoForCausalLM"
CLASSIFIER = "OlmoForSequenceClassification"
CHECKPOINTS = ("allenai/OLMo-1B-hf", "allenai/OLMo-7B-hf", "allenai/OLMo-1.7-7B-hf")
RULES = llama.RULES


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec; the norm's 1e-5 is fixed."""
    value = llama.with_norm(
        llama.spec({**config, "mlp_bias": False}), Norm(kind="layer", eps=1e-5, affine=False)
    )
    clip = None if config.get("clip_qkv") is None else keys.real(config, "clip_qkv")
    value = llama.with_attention(value, lambda i, attn: replace(attn, clip_qkv=clip))
    return llama.with_rope(value, fp32=True)


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = llama.config(value)
    del result["mlp_bias"], result["rms_norm_eps"]
    return {**result, "clip_qkv": value.layers[0].attn.clip_qkv}
