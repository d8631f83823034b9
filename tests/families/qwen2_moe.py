"""Qwen2-MoE: a shared expert behind a gate, dense layers in between."""

from __future__ import annotations

from tests.families import LLAMA, Case, causal
from tests.families.mixtral import wrong_moe

EXPERTS = LLAMA | {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_experts": 5,
    "num_experts_per_tok": 2,
}

CASES = [
    Case(
        name="qwen2_moe",
        hf=causal("Qwen2Moe", EXPERTS | {"decoder_sparse_step": 1, "mlp_only_layers": [1]}),
        wrong=wrong_moe(renorm=True),
    ),
    Case(
        name="qwen2_moe-every-other",
        hf=causal(
            "Qwen2Moe", EXPERTS | {"decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False}
        ),
        wrong=wrong_moe(top_k=3),
    ),
    Case(
        name="qwen2_moe-window",
        hf=causal(
            "Qwen2Moe", EXPERTS | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
        ),
        wrong=wrong_moe(renorm=True),
    ),
]
