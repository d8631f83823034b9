"""XGLM: sinusoidal positions, scaled embeddings."""

from __future__ import annotations

from typing import Any

from tests.families import LAYERS, VOCAB, Case, causal, wrong_spec

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 48,
    "ffn_dim": 100,
    "num_layers": LAYERS,
    "attention_heads": 6,
    "max_position_embeddings": 64,
}

CASES = [
    Case(name="xglm", hf=causal("XGLM", SMALL), wrong=wrong_spec(pos_offset=1)),
    Case(
        name="xglm-unscaled",
        hf=causal("XGLM", SMALL | {"scale_embedding": False, "activation_function": "relu"}),
        wrong=wrong_spec(embed_scale=48**0.5),
    ),
]
