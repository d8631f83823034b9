"""Nemotron 3 and 4, Minitron (Parmar et al. 2024, arXiv:2402.16819): layer norms with gains 1 + w, a plain
FFN of squared ReLUs, half of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.families import arcee, llama
from caravan.model.spec import Norm, Spec

ARCHITECTURE = "NemotronForCausalLM"
CLASSIFIER = "NemotronForSequenceClassification"
CHECKPOINTS = ("nvidia/Nemotron-4-*", "nvidia/Minitron-4B-Base", "nvidia/Minitron-8B-Base")
RULES = arcee.RULES


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec."""
    share = keys.real(config, "partial_rotary_factor", "rope_percent", default=0.5)
    value = arcee.spec({**config, "partial_rotary_factor": share})
    eps = keys.real(config, "norm_eps", default=1e-5)
    return llama.with_norm(value, Norm(kind="layer", eps=eps, bias=True, unit_offset=True, gain_fp32=True))


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = llama.config(value)
    del result["rms_norm_eps"]
    attn = value.layers[0].attn
    return {**result, "norm_eps": value.layers[0].norm.eps, **llama.rope_config(attn.rope, attn.head_dim)}
