"""GPT-J: one norm for attention and MLP, neighbouring rotary pairs, a bias on the head."""

from __future__ import annotations

from typing import Any

from tests.families import LAYERS, VOCAB, Case, causal, wrong_layer, wrong_rope

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": 64,
    "n_embd": 48,
    "n_layer": LAYERS,
    "n_head": 3,
    "rotary_dim": 12,
}

CASES = [
    Case(name="gptj", hf=causal("GPTJ", SMALL), wrong=wrong_rope(theta=9e3), gradients=True),
    Case(
        name="gptj-whole-heads",
        hf=causal("GPTJ", SMALL | {"rotary_dim": 16, "n_inner": 100, "activation_function": "gelu"}),
        wrong=wrong_layer(beta=0.99),
    ),
]
