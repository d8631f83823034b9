"""GPT-Neo: alternating local and global attention, unscaled scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.families import LAYERS, VOCAB, Case, causal, change, wrong_attn

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "hidden_size": 48,
    "num_layers": LAYERS,
    "num_heads": 6,
    "window_size": 8,
    "attention_types": [[["global", "local"], LAYERS // 2]],
}
UNEVEN = {
    "attention_types": [[["local"], 1], [["global"], 2], [["local"], 1]],
    "intermediate_size": 100,
    "activation_function": "relu",
    "layer_norm_epsilon": 1e-3,
}


def wider(spec: Any) -> Any:
    """Windows one token too wide, where there are windows."""
    wide = change(spec, "attn", window=9).layers
    layers = tuple(w if old.attn.window else old for old, w in zip(spec.layers, wide, strict=True))
    return replace(spec, layers=layers)


CASES = [
    Case(name="gpt_neo", hf=causal("GPTNeo", SMALL), wrong=wider, gradients=True),
    Case(name="gpt_neo-uneven", hf=causal("GPTNeo", SMALL | UNEVEN), wrong=wrong_attn(scale=8**-0.5)),
]
