"""StarCoder 2."""

from __future__ import annotations

from tests.families import LLAMA, Case, causal, wrong_attn, wrong_ffn

CASES = [
    Case(
        name="starcoder2",
        hf=causal("Starcoder2", LLAMA | {"sliding_window": 8}),
        wrong=wrong_attn(window=None),
    ),
    Case(
        name="starcoder2-plain",
        hf=causal("Starcoder2", LLAMA | {"use_bias": False, "tie_word_embeddings": False}),
        wrong=wrong_ffn(act="gelu"),
    ),
]
