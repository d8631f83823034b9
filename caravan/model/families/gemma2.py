"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118): norms on both sides of a sublayer, capped scores and logits,
a window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import gemma, llama
from caravan.model.spec import Spec

ARCHITECTURE = "Gemma2ForCausalLM"
CLASSIFIER = "Gemma2ForSequenceClassification"
CHECKPOINTS = ("google/gemma-2-2b", "google/gemma-2-9b", "google/gemma-2-27b")
RULES = """
table gemma2 like llama
@.post_attention_layernorm -> p1; @.{pre,post}_feedforward_layernorm -> {n2,p2}
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec; without `layer_types` every second layer has the window, the first one included.
    The caps and the window are taken as absent when null, and as the release's when missing."""
    full = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096, **config}
    return sandwich(full, lambda i: i % 2 == 0)


def sandwich(config: Mapping[str, Any], slides: Any) -> Spec:
    """A Gemma with norms before and after each sublayer; slides(layer) where `layer_types` is silent."""
    act = config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh"
    value = llama.with_layers(gemma.base({**config, "hidden_act": act}), post="out")
    scale = keys.positive(config, "query_pre_attn_scalar", default=256) ** -0.5
    size = llama.window(config)
    kinds = llama.layer_kinds(config, len(value.layers), slides)
    value = llama.with_attention(
        value,
        lambda i, attn: replace(
            attn,
            scale=scale,
            softcap=_cap(config, "attn_logit_softcapping"),
            window=size if kinds[i] else None,
        ),
    )
    return replace(value, logit_softcap=_cap(config, "final_logit_softcapping"))


def _cap(config: Mapping[str, Any], name: str) -> float | None:
    return None if config.get(name) is None else keys.real(config, name)


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    first = value.layers[0].attn
    size = next((attn.window for attn in value.attns if attn.window), None)
    return {
        **gemma.config(value),
        "query_pre_attn_scalar": scalar(first.scale),
        "attn_logit_softcapping": first.softcap,
        "final_logit_softcapping": value.logit_softcap,
        "layer_types": llama.written_kinds(value),
        **({"sliding_window": size} if size else {}),
    }


def scalar(scale: float) -> float | int:
    """The number whose power -1/2 is `scale`: a whole one where that is exact."""
    whole = round(scale**-2)
    return whole if whole**-0.5 == scale else scale**-2
