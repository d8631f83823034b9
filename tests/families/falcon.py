"""Falcon in its four shapes: 7B, 40B and 180B, 11B, RW."""

from __future__ import annotations

from typing import Any

from tests.families import LAYERS, VOCAB, Case, causal, wrong_attn, wrong_ffn, wrong_norm, wrong_rope

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
}
GROUPS = {"num_kv_heads": 2, "new_decoder_architecture": True}
ONE_NORM = {"num_ln_in_parallel_attn": 1, "ffn_hidden_size": 100, "tie_word_embeddings": False}
RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}

CASES = [
    Case(name="falcon-7b", hf=causal("Falcon", SMALL), wrong=wrong_ffn(act="gelu_new"), gradients=True),
    Case(name="falcon-40b", hf=causal("Falcon", SMALL | GROUPS), wrong=wrong_rope(theta=9e3), gradients=True),
    Case(name="falcon-11b", hf=causal("Falcon", SMALL | GROUPS | ONE_NORM), wrong=wrong_norm(eps=1e-3)),
    # transformers' eager path adds ALiBi twice
    Case(
        name="falcon-rw",
        hf=causal("Falcon", SMALL | RW, "sdpa"),
        wrong=wrong_attn(alibi_scale=1.0),
        gradients=True,
    ),
    Case(
        name="falcon-rw-rotary",
        hf=causal("Falcon", SMALL | RW | {"alibi": False, "multi_query": True}),
        wrong=wrong_rope(dim=8),
    ),
]
