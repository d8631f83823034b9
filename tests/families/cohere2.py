"""Command R7B: windows with positions, global layers without."""

from __future__ import annotations

from tests.families import LLAMA, Case, causal, wrong_attn

CASES = [
    Case(
        name="cohere2",
        hf=causal("Cohere2", LLAMA | {"sliding_window": 8, "sliding_window_pattern": 2}),
        wrong=wrong_attn(rope=None),
    ),
    Case(
        name="cohere2-global",
        hf=causal(
            "Cohere2",
            LLAMA | {"sliding_window": 8, "layer_types": ["full_attention"] * LLAMA["num_hidden_layers"]},
        ),
        wrong=wrong_attn(scale=1.0),
    ),
]
