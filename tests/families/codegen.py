"""CodeGen: GPT-J with queries, values and keys in four shards."""

from __future__ import annotations

from typing import Any

from tests.families import LAYERS, VOCAB, Case, causal, wrong_ffn, wrong_rope

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": 64,
    "n_embd": 72,
    "n_layer": LAYERS,
    "n_head": 12,
    "rotary_dim": 4,
}

CASES = [
    Case(name="codegen", hf=causal("CodeGen", SMALL), wrong=wrong_rope(dim=2)),
    Case(
        name="codegen-wide-inner",
        hf=causal("CodeGen", SMALL | {"n_head": 4, "rotary_dim": 18, "n_inner": 100}),
        wrong=wrong_ffn(act="gelu"),
    ),
]
