"""OLMoE: queries and keys normalised over the whole projection, then clipped."""

from __future__ import annotations

from tests.families import LLAMA, Case, causal, wrong_attn
from tests.families.mixtral import wrong_moe

EXPERTS = LLAMA | {"intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2}

CASES = [
    Case(name="olmoe", hf=causal("Olmoe", EXPERTS | {"clip_qkv": 0.4}), wrong=wrong_attn(clip_qkv=None)),
    Case(
        name="olmoe-renorm",
        hf=causal("Olmoe", EXPERTS | {"norm_topk_prob": True, "attention_bias": True}),
        wrong=wrong_moe(renorm=False),
    ),
]
