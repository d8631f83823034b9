"""Gemma 3 from 4B up (Gemma Team 2025, arXiv:2503.19786): gemma3_text behind a vision tower; we open the
text model and keep the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.families import gemma3_text, llava
from caravan.model.spec import Spec

ARCHITECTURE = "Gemma3ForConditionalGeneration"
CLASSIFIER = None
CHECKPOINTS = ("google/gemma-3-4b-*", "google/gemma-3-12b-*", "google/gemma-3-27b-*", "google/medgemma-*")
RULES = """
table gemma3 like gemma3_text @=language_model.model.layers.{i} ~=language_model.model
prefix? language_model.
language_model.lm_head -> head
"""
KEPT = llava.KEPT
ASSUMED = {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4}
"""What the class of transformers assumes; the 4B leaves it out."""
opened, carried = llava.opened, llava.carried


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec of the text model. Raises UserError naming the key."""
    keys.refuse(llava.inner(config), "model_type", "gemma3_text")
    return gemma3_text.spec(llava.text(config, ASSUMED, tie=True))


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json, as far as it is about text."""
    return llava.nested(gemma3_text.config(value))
