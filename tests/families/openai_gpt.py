"""GPT-1: norms after the sum."""

from __future__ import annotations

from typing import Any

from tests.families import LAYERS, VOCAB, Case, tiny, wrong_ffn, wrong_norm

SMALL: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 48, "n_head": 6, "n_layer": LAYERS, "n_positions": 64}
CLASSES = ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel")

CASES = [
    Case(name="openai_gpt", hf=tiny(*CLASSES, SMALL), wrong=wrong_ffn(act="gelu"), gradients=True),
    Case(
        name="openai_gpt-silu",
        hf=tiny(*CLASSES, SMALL | {"afn": "silu", "layer_norm_epsilon": 1e-3}),
        wrong=wrong_norm(eps=1e-5),
    ),
]
