"""Qwen3-MoE: no shared expert, queries and keys normalised per head."""

from __future__ import annotations

from tests.families import LLAMA, Case, causal, wrong_attn
from tests.families.mixtral import wrong_moe

EXPERTS = LLAMA | {"moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2, "head_dim": 12}

CASES = [
    Case(
        name="qwen3_moe",
        hf=causal("Qwen3Moe", EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [2]}),
        wrong=wrong_moe(renorm=False),
    ),
    Case(
        name="qwen3_moe-window",
        hf=causal(
            "Qwen3Moe", EXPERTS | {"use_sliding_window": True, "sliding_window": 8, "decoder_sparse_step": 2}
        ),
        wrong=wrong_attn(window=9),
    ),
]
