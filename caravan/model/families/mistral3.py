"""Mistral Small 3.1 and 3.2: a Mistral and a vision tower that reads pictures of any shape; we open the text
model and keep the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.families import llava, mistral
from caravan.model.spec import Spec

ARCHITECTURE = "Mistral3ForConditionalGeneration"
CLASSIFIER = None
CHECKPOINTS = ("mistralai/Mistral-Small-3.1-24B-*", "mistralai/Mistral-Small-3.2-24B-*")
RULES = "table mistral3 like llava"
KEPT = llava.KEPT
opened, carried = llava.opened, llava.carried


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec of the text model. Raises UserError naming the key."""
    keys.refuse(llava.inner(config), "model_type", "mistral")
    return mistral.spec(llava.text(config, {}, tie=False))


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json, as far as it is about text."""
    return llava.nested(mistral.config(value))
