"""Nemotron."""

from __future__ import annotations

from tests.families import LLAMA, Case, causal, wrong_norm, wrong_rope

CASES = [
    Case(
        name="nemotron",
        hf=causal("Nemotron", LLAMA),
        wrong=wrong_norm(unit_offset=False),
    ),
    Case(
        name="nemotron-bias", hf=causal("Nemotron", LLAMA | {"attention_bias": True}), wrong=wrong_rope(dim=8)
    ),
]
