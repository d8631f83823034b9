"""Persimmon, with and without normalised queries and keys."""

from __future__ import annotations

from typing import Any

from tests.families import LAYERS, VOCAB, Case, causal, wrong_ffn, wrong_rope
from tests.families.gpt_neox import turned

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}

CASES = [
    Case(
        name="persimmon",
        hf=causal("Persimmon", SMALL | turned(0.5, rope_theta=25_000.0)),
        wrong=wrong_rope(theta=10_000.0),
    ),
    Case(
        name="persimmon-plain",
        hf=causal("Persimmon", SMALL | turned(0.25) | {"qk_layernorm": False}),
        wrong=wrong_ffn(act="relu"),
    ),
]
