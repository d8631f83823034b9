"""Gemma 1."""

from __future__ import annotations

from tests.families import LLAMA, Case, causal, wrong_ffn, wrong_spec

GEMMA = LLAMA | {"head_dim": 12, "hidden_act": "gelu_pytorch_tanh"}

CASES = [
    Case(
        name="gemma-mqa",
        hf=causal("Gemma", GEMMA | {"num_key_value_heads": 1}),
        wrong=wrong_ffn(act="gelu"),
    ),
    Case(name="gemma", hf=causal("Gemma", GEMMA), wrong=wrong_spec(embed_scale=1.0)),
]
