"""InternLM 1 (InternLM Team 2023): Llama with biases on q, k, v and o. It is written as the Llama it is,
which needs no code of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.families import llama
from caravan.model.spec import Spec

ARCHITECTURE = "LlamaForCausalLM"
CLASSIFIER = "LlamaForSequenceClassification"
MODEL_TYPE = "llama"
CHECKPOINTS = ("internlm/internlm-7b", "internlm/internlm-20b", "internlm/internlm-chat-*")
RULES = llama.RULES


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec; its own keys are `bias` and `rotary` {base, type, scaling_factor}."""
    rotary = keys.table(config, "rotary")
    said = dict(config)
    if rotary:
        kind = keys.word(rotary, "type", known={"dynamic": "dynamic", "origin": "default"}, default="dynamic")
        factor = keys.real(rotary, "scaling_factor", default=1.0)
        said["rope_parameters"] = {
            "rope_theta": keys.real(rotary, "base", default=10_000),
            "rope_type": kind,
            "factor": factor,
        }
    return llama.spec({**said, "attention_bias": keys.flag(config, "bias", "attention_bias", default=True)})


config = llama.config
