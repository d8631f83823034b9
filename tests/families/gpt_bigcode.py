"""GPT-BigCode (StarCoder, SantaCoder): one key/value head, or as many as there are queries."""

from __future__ import annotations

from typing import Any

from tests.families import LAYERS, VOCAB, Case, causal, wrong_attn, wrong_ffn

SMALL: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 48, "n_head": 6, "n_layer": LAYERS, "n_positions": 64}
MANY = {"multi_query": False, "n_inner": 100, "scale_attn_weights": False, "tie_word_embeddings": False}

CASES = [
    Case(name="gpt_bigcode", hf=causal("GPTBigCode", SMALL), wrong=wrong_ffn(act="gelu")),
    Case(name="gpt_bigcode-mha", hf=causal("GPTBigCode", SMALL | MANY), wrong=wrong_attn(scale=8**-0.5)),
]
