"""GLM-4-0414 (9B, 32B and Z1): GLM-4 with norms on both sides of a sublayer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model.families import glm, llama
from caravan.model.spec import Spec

ARCHITECTURE = "Glm4ForCausalLM"
CLASSIFIER = "Glm4ForSequenceClassification"
CHECKPOINTS = ("THUDM/GLM-4-9B-0414", "THUDM/GLM-4-32B-0414", "THUDM/GLM-Z1-*")
RULES = """
table glm4 like glm
@.post_{self_attn,mlp}_layernorm -> {p1,p2}
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec."""
    return llama.with_layers(glm.spec(config), post="out")


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    return glm.config(value)
