"""Granite 3."""

from __future__ import annotations

from tests.families import LLAMA, Case, causal, wrong_layer

SCALES = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.3,
    "logits_scaling": 7.0,
}

CASES = [Case(name="granite", hf=causal("Granite", LLAMA | SCALES), wrong=wrong_layer(beta=0.31))]
