"""BLOOM, with the residual taken from the stream or from the norm."""

from __future__ import annotations

from typing import Any

from tests.families import LAYERS, VOCAB, Case, causal, wrong_attn, wrong_ffn, wrong_layer

SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 48, "n_layer": LAYERS, "n_head": 6}
FROM_NORM = {"apply_residual_connection_post_layernorm": True, "layer_norm_epsilon": 1e-3}

CASES = [
    Case(name="bloom", hf=causal("Bloom", SMALL), wrong=wrong_attn(alibi_max=7.0), gradients=True),
    Case(
        name="bloom-residual-from-norm",
        hf=causal("Bloom", SMALL | FROM_NORM),
        wrong=wrong_layer(res_from_norm=False),
        gradients=True,
    ),
    Case(
        name="bloom-eight-heads-untied",
        hf=causal("Bloom", SMALL | {"n_head": 8, "tie_word_embeddings": False}),
        wrong=wrong_ffn(act="gelu"),
    ),
]
