"""DeepSeek-V2 and V2-Lite: latent attention, group-limited choice, shared experts, YaRN temperatures."""

from __future__ import annotations

from tests.families import LAYERS, VOCAB, Case, causal, wrong_attn
from tests.families.mixtral import wrong_moe

LATENT = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 88, "moe_intermediate_size": 24,
    "num_hidden_layers": LAYERS, "num_attention_heads": 6, "first_k_dense_replace": 1, "kv_lora_rank": 20,
    "q_lora_rank": 16, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32, "beta_slow": 1,
        "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 16,
    }
}  # fmt: skip

CASES = [
    Case(
        name="deepseek_v2",
        hf=causal(
            "DeepseekV2",
            LATENT | {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy",
                      "routed_scaling_factor": 1.7},
        ),
        wrong=wrong_moe(n_group=1, topk_group=1),
    ),
    Case(
        name="deepseek_v2-lite",
        hf=causal("DeepseekV2", LATENT | YARN | {"q_lora_rank": None, "first_k_dense_replace": 2}),
        wrong=wrong_attn(scale=18**-0.5),
        gradients=True,
    ),
    Case(
        name="deepseek_v2-bias",
        hf=causal("DeepseekV2", LATENT | {"attention_bias": True, "first_k_dense_replace": 0}),
        wrong=wrong_moe(scale=1.1),
    ),
]  # fmt: skip
