"""Phi-1, 1.5 and 2, plain and with normalised queries and keys."""

from __future__ import annotations

from typing import Any

from tests.families import LAYERS, VOCAB, Case, causal, wrong_ffn, wrong_rope
from tests.families.gpt_neox import turned

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "intermediate_size": 100,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}
NORMED = {"num_key_value_heads": 1, "qk_layernorm": True, "layer_norm_eps": 1e-3}

CASES = [
    Case(name="phi-1", hf=causal("Phi", SMALL | turned(0.5)), wrong=wrong_rope(dim=8)),
    Case(name="phi-2", hf=causal("Phi", SMALL | turned(0.4)), wrong=wrong_ffn(act="gelu")),
    Case(
        name="phi-normed",
        hf=causal("Phi", SMALL | turned(0.5) | NORMED),
        wrong=wrong_rope(theta=9e3),
        gradients=True,
    ),
]
