"""Qwen 3 (dense)."""

from __future__ import annotations

from tests.families import LLAMA, Case, causal, wrong_attn

CASES = [
    Case(name="qwen3", hf=causal("Qwen3", LLAMA | {"head_dim": 12}), wrong=wrong_attn(scale=0.25)),
]
