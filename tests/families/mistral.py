"""Mistral with and without its sliding window."""

from __future__ import annotations

from tests.families import LLAMA, Case, causal, wrong_attn

CASES = [
    Case(
        name="mistral-window",
        hf=causal("Mistral", LLAMA | {"head_dim": 12, "sliding_window": 8}),
        wrong=wrong_attn(window=9),
    ),
    Case(
        name="mistral",
        hf=causal("Mistral", LLAMA | {"sliding_window": None}),
        wrong=wrong_attn(window=8),
    ),
]
