"""GPT-2 and the CRFM variant that divides scores by the layer's number."""

from __future__ import annotations

from typing import Any

from tests.families import LAYERS, VOCAB, Case, tiny, wrong_attn, wrong_ffn

GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 48, "n_head": 6, "n_layer": LAYERS, "n_positions": 64}
SCALED = {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3, "n_inner": 100}

CASES = [
    Case(name="gpt2", hf=tiny("GPT2Config", "GPT2LMHeadModel", GPT2), wrong=wrong_ffn(act="gelu")),
    Case(
        name="gpt2-crfm",
        hf=tiny("GPT2Config", "GPT2LMHeadModel", GPT2 | SCALED | {"activation_function": "gelu"}),
        wrong=wrong_attn(scale=8**-0.5),
    ),
    Case(
        name="gpt2-untied",
        hf=tiny("GPT2Config", "GPT2LMHeadModel", GPT2 | {"tie_word_embeddings": False}),
        wrong=wrong_attn(n_kv=6, scale=1.0),
    ),
]
