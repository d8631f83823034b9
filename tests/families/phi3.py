"""Phi-3 with a window and with LongRoPE."""

from __future__ import annotations

from typing import Any

from tests.families import LLAMA, Case, causal, wrong_attn, wrong_rope


def long(original: int) -> dict[str, Any]:
    """LongRoPE that switches at `original` positions."""
    return {
        "max_position_embeddings": 64,
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 4.0, 8.0],
            "original_max_position_embeddings": original,
        },
    }


CASES = [
    Case(
        name="phi3-window", hf=causal("Phi3", LLAMA | {"sliding_window": 8}), wrong=wrong_attn(window=None)
    ),
    Case(
        name="phi3-partial",
        hf=causal("Phi3", LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                       "partial_rotary_factor": 0.75}}),
        wrong=wrong_rope(dim=8),
    ),
    Case(name="phi3-short", hf=causal("Phi3", LLAMA | long(32)), wrong=wrong_rope(scaling=None)),
    Case(
        name="phi3-long",
        hf=causal("Phi3", LLAMA | long(16)),
        wrong=wrong_rope(scaling=None),
        decode="frequencies switch at the original context, so cached keys do, by design",
        left_pad="transformers takes the longest row's frequencies for all rows",
        packing="the longest text's frequencies stay for the shorter ones after it",
    ),
]  # fmt: skip
