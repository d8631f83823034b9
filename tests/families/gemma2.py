"""Gemma 2."""

from __future__ import annotations

from tests.families import LLAMA, Case, causal, wrong_attn, wrong_spec

GEMMA2 = LLAMA | {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 8,
                  "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}  # fmt: skip

CASES = [
    Case(name="gemma2", hf=causal("Gemma2", GEMMA2), wrong=wrong_attn(softcap=None), gradients=True),
    Case(
        name="gemma2-global",
        hf=causal("Gemma2", GEMMA2 | {"layer_types": ["full_attention"] * GEMMA2["num_hidden_layers"]}),
        wrong=wrong_attn(softcap=None),
    ),
    Case(
        name="gemma2-uncapped",
        hf=causal("Gemma2", GEMMA2 | {"attn_logit_softcapping": None}),
        wrong=wrong_spec(logit_softcap=30.0),
    ),
]
