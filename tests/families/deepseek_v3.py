"""DeepSeek-V3: sigmoid scores, a bias on the choice, groups judged by their best two."""

from __future__ import annotations

from tests.families import Case, causal
from tests.families.deepseek_v2 import LATENT, YARN
from tests.families.mixtral import wrong_moe

THREE = LATENT | {"n_shared_experts": 1, "n_group": 3, "topk_group": 2, "num_key_value_heads": 6}

CASES = [
    Case(name="deepseek_v3", hf=causal("DeepseekV3", THREE), wrong=wrong_moe(group_score="max")),
    Case(
        name="deepseek_v3-yarn",
        hf=causal("DeepseekV3", THREE | YARN | {"rope_interleave": False, "norm_topk_prob": False}),
        wrong=wrong_moe(renorm=True),
    ),
]
