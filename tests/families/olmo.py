"""OLMo 1."""

from __future__ import annotations

from tests.families import LLAMA, Case, causal, wrong_attn

CASES = [
    Case(
        name="olmo-clip",
        hf=causal("Olmo", LLAMA | {"num_key_value_heads": 6, "clip_qkv": 0.4}),
        wrong=wrong_attn(clip_qkv=None),
    ),
    Case(name="olmo", hf=causal("Olmo", LLAMA), wrong=wrong_attn(clip_qkv=1.0)),
]
