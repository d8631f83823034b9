"""Qwen 1.5, 2 and 2.5."""

from __future__ import annotations

from tests.families import LLAMA, Case, causal, wrong_attn, wrong_rope

WINDOWED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}

CASES = [
    Case(
        name="qwen2", hf=causal("Qwen2", LLAMA | {"tie_word_embeddings": True}), wrong=wrong_rope(theta=2e4)
    ),
    Case(name="qwen2-window", hf=causal("Qwen2", LLAMA | WINDOWED), wrong=wrong_attn(window=None)),
]
