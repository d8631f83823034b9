"""Granite 3 (IBM 2024): Llama with a multiplier on embeddings, scores, residual branches and logits (the
maximal-update parametrisation of Yang et al. 2022, arXiv:2203.03466)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import llama
from caravan.model.spec import Spec

ARCHITECTURE = "GraniteForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("ibm-granite/granite-3.*-2b-*", "ibm-granite/granite-3.*-8b-*")
RULES = llama.RULES


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec; `attention_multiplier` is the whole scale of the scores."""
    value = llama.with_layers(llama.spec(config), beta=keys.real(config, "residual_multiplier", default=1.0))
    scale = keys.real(config, "attention_multiplier", default=1.0)
    value = llama.with_attention(value, lambda i, attn: replace(attn, scale=scale))
    return replace(
        value,
        embed_scale=keys.real(config, "embedding_multiplier", default=1.0),
        logit_scale=1 / keys.positive(config, "logits_scaling", default=1.0),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    layer = value.layers[0]
    return {
        **llama.config(value),
        "attention_multiplier": layer.attn.scale,
        "residual_multiplier": layer.beta,
        "embedding_multiplier": value.embed_scale,
        "logits_scaling": llama.inverse(value.logit_scale),
    }
