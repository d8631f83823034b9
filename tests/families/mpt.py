"""MPT: 7B, StoryWriter with its clip, another scale."""

from __future__ import annotations

from typing import Any

from tests.families import LAYERS, VOCAB, Case, causal, wrong_attn, wrong_ffn

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 48,
    "n_heads": 6,
    "n_layers": LAYERS,
    "max_seq_len": 64,
}

CASES = [
    Case(name="mpt", hf=causal("Mpt", SMALL), wrong=wrong_ffn(act="gelu_new")),
    Case(
        name="mpt-clipped",
        hf=causal("Mpt", SMALL | {"attn_config": {"clip_qkv": 0.4}}),
        wrong=wrong_attn(clip_qkv=None),
        gradients=True,
    ),
    Case(
        name="mpt-scaled",
        hf=causal("Mpt", SMALL | {"attn_config": {"softmax_scale": 0.5}, "tie_word_embeddings": False}),
        wrong=wrong_attn(alibi_max=7.0),
    ),
]
