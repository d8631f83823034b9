"""OLMoE (Muennighoff et al. 2024, arXiv:2409.02060): 64 small experts, queries and keys normalised over the
whole projection and clipped after that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import llama
from caravan.model.families.mixtral import experts_of, with_experts
from caravan.model.families.qwen2_moe import experts
from caravan.model.spec import Spec

ARCHITECTURE = "OlmoeForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("allenai/OLMoE-1B-7B-0924", "allenai/OLMoE-1B-7B-0125")

RULES = """
table olmoe like llama
@.mlp.gate -> ffn.router
@.mlp.experts.{e}.{gate,up}_proj.weight -> ffn.xin : cat; @.mlp.experts.{e}.down_proj.weight -> ffn.xout
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    keys.refuse(config, "mlp_bias", False)
    base = llama.spec({"rms_norm_eps": 1e-5, **config})
    clip = keys.real(config, "clip_qkv") if config.get("clip_qkv") is not None else None
    norm = base.layers[0].norm
    base = llama.with_attention(
        base, lambda i, attn: replace(attn, qk_norm=norm, qk_norm_over="full", clip_qkv=clip)
    )
    moe = experts({**config, "moe_intermediate_size": None}, default=64, top_k=8, aux_coef=0.01)
    return with_experts(base, lambda i: moe)


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = llama.config(value)
    del result["mlp_bias"]
    moe = experts_of(value)
    return {
        **result,
        "intermediate_size": moe.d_ff,
        "num_experts": moe.n_expert,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.renorm,
        "router_aux_loss_coef": moe.aux_coef,
        "clip_qkv": value.attns[0].clip_qkv,
    }
