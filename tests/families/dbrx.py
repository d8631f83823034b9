"""DBRX: experts in slabs, clipped projections, a rotary base in attn_config."""

from __future__ import annotations

from tests.families import LAYERS, VOCAB, Case, causal, wrong_rope
from tests.families.mixtral import wrong_moe

DBRX = {
    "vocab_size": VOCAB, "d_model": 48, "n_heads": 6, "n_layers": LAYERS, "max_seq_len": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}  # fmt: skip
FEED = {"ffn_hidden_size": 24, "moe_num_experts": 5, "moe_top_k": 2}

CASES = [
    Case(
        name="dbrx",
        hf=causal(
            "Dbrx",
            DBRX | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 0.4, "rope_theta": 5e5}, "ffn_config": FEED},
        ),
        wrong=wrong_rope(theta=1e4),
        legacy="the old keys lie in attn_config: tests/unit/test_moe_families.py",
    ),
    Case(
        name="dbrx-plain",
        hf=causal(
            "Dbrx",
            DBRX
            | {
                "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "ffn_config": FEED | {"moe_normalize_expert_weights": None, "ffn_act_fn": {"name": "gelu"}},
            },
        ),
        wrong=wrong_moe(renorm=True),
        legacy="the old keys lie in attn_config: tests/unit/test_moe_families.py",
    ),
]
