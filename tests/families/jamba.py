"""Jamba: Mamba, attention and experts in one stack."""

from __future__ import annotations

from typing import Any

from caravan.model.spec import Norm
from tests.families import VOCAB, Case, causal, change
from tests.families.mamba import PADDING

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "mamba_d_state": 5,
    "mamba_dt_rank": 7,
}

CASES = [
    Case(
        name="jamba",
        hf=causal("Jamba", SMALL),
        wrong=lambda spec: change(spec, "ssm", dt_norm=Norm(eps=1e-3)),
    ),
    Case(
        name="jamba-dense",
        hf=causal("Jamba", SMALL | {"num_experts": 1, "num_experts_per_tok": 1, "mamba_proj_bias": True}),
        wrong=lambda spec: change(spec, "norm", eps=1e-3),
        left_pad=PADDING,
    ),
]
