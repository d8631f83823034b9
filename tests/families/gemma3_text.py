"""Gemma 3, text."""

from __future__ import annotations

from typing import Any

from tests.families import LLAMA, Case, tiny, wrong_attn, wrong_rope

GEMMA3: dict[str, Any] = LLAMA | {
    "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 8, "sliding_window_pattern": 2,
}  # fmt: skip
STRETCHED = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
}

CASES = [
    Case(
        name="gemma3",
        hf=tiny("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA3),
        wrong=wrong_rope(theta=1e4),
    ),
    Case(
        name="gemma3-linear",
        hf=tiny("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA3 | STRETCHED),
        wrong=wrong_attn(scale=12**-0.5),
    ),
]
