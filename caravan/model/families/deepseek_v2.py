"""DeepSeek-V2 and V2-Lite (DeepSeek-AI 2024, arXiv:2405.04434): latent attention; dense first layers, then
many small experts, chosen within the best groups, beside shared ones that every token passes.

The load-balancing loss of the paper is per sequence; ours is pooled over the batch, with the same
coefficient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import llama
from caravan.model.families.mixtral import choices, experts_of, with_experts
from caravan.model.positions import yarn_scale
from caravan.model.spec import FFN, MLA, Attn, Layer, MoE, Norm, Spec

ARCHITECTURE = "DeepseekV2ForCausalLM"
CLASSIFIER = "DeepseekV2ForSequenceClassification"
CHECKPOINTS = (
    "deepseek-ai/DeepSeek-V2",
    "deepseek-ai/DeepSeek-V2-Lite",
    "deepseek-ai/DeepSeek-Coder-V2-Lite-Base",
)

RULES = """
table deepseek_v2 like qwen2_moe s/shared_expert./shared_experts./
- mix.qkv; - mix.kn; - ffn.shared_gate; @.mlp.gate.e_score_correction_bias -> ffn.router_bias
@.self_attn.{q_proj,q_b_proj} -> mix.{q,qb} : rope_mla_q
@.self_attn.kv_a_proj_with_mqa -> mix.kva : rope_mla_kv
@.self_attn.{q_a_proj,q_a_layernorm,kv_a_layernorm,kv_b_proj} -> mix.{qa,qn,kvn,kvb}
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    keys.refuse(config, "scoring_func", "softmax")
    keys.refuse(config, "norm_topk_prob", False)
    grouped = keys.word(
        config, "topk_method", known={"greedy": False, "group_limited_greedy": True}, default="greedy"
    )
    moe = experts(config, aux_coef=0.001, scale=1.0)
    if grouped:
        moe = in_groups(config, moe)
    return latent(config, moe, fp32=True, interleaved=True)


def experts(config: Mapping[str, Any], aux_coef: float, scale: float) -> MoE:
    """What V2 and V3 say alike: softmax, no renormalisation, no groups."""
    keys.refuse(config, "moe_layer_freq", 1)
    count = keys.size(config, "n_routed_experts", "num_local_experts", "num_experts")
    inner = keys.size(config, "moe_intermediate_size")
    shared = config.get("n_shared_experts")
    return MoE(
        n_expert=count,
        top_k=choices(config, "num_experts_per_tok", count),
        d_ff=inner,
        renorm=False,
        scale=keys.real(config, "routed_scaling_factor", default=scale),
        shared_ff=inner * keys.size(config, "n_shared_experts") if shared else 0,
        aux_coef=keys.real(config, "aux_loss_alpha", default=aux_coef),
    )


def in_groups(config: Mapping[str, Any], moe: MoE) -> MoE:
    """The same with n_group and topk_group, checked against the number of experts and choices."""
    count, chosen = keys.size(config, "n_group", default=1), keys.size(config, "topk_group", default=1)
    if moe.n_expert % count:
        raise keys.wrong("n_group", count, f"a divisor of the {moe.n_expert} experts")
    if chosen > count or moe.top_k > chosen * (moe.n_expert // count):
        raise keys.wrong("topk_group", chosen, f"enough of {count} groups for {moe.top_k} choices")
    return replace(moe, n_group=count, topk_group=chosen)


def latent(config: Mapping[str, Any], moe: MoE, fp32: bool, interleaved: bool) -> Spec:
    """The whole model around its experts. Scores are multiplied by the square of YaRN's temperature for
    `mscale_all_dim` (DeepSeek-V2's code; appendix of arXiv:2309.00071)."""
    keys.refuse(config, "mlp_bias", False)
    heads, bias = keys.size(config, "num_attention_heads"), keys.flag(config, "attention_bias", default=False)
    ranks = keys.size(config, "q_lora_rank") if config.get("q_lora_rank") else None
    mla = MLA(
        q_rank=ranks,
        kv_rank=keys.size(config, "kv_lora_rank"),
        nope=keys.size(config, "qk_nope_head_dim"),
        rope=keys.size(config, "qk_rope_head_dim"),
        v=keys.size(config, "v_head_dim"),
    )
    if config.get("num_key_value_heads") not in (None, heads):
        raise keys.wrong("num_key_value_heads", config["num_key_value_heads"], f"{heads}, as there are heads")
    rope = replace(llama.rope(config, mla.rope), fp32=fp32, interleaved=interleaved)
    scaling, width = rope.scaling, mla.nope + mla.rope
    warmth = yarn_scale(scaling.factor, scaling.mscale_all_dim or 0.0) if scaling else 1.0
    norm = Norm(kind="rms", eps=keys.real(config, "rms_norm_eps", default=1e-6))
    attn = Attn(
        n_head=heads, n_kv=heads, head_dim=width, qkv_bias=bias, o_bias=bias, scale=width**-0.5 * warmth**2,
        rope=rope, mla=mla,
    )  # fmt: skip
    act = keys.activation(config, "hidden_act", default="silu")
    ffn = FFN(kind="glu", d_ff=keys.size(config, "intermediate_size"), act=act)
    base = Spec(
        vocab=keys.size(config, "vocab_size"),
        d=keys.size(config, "hidden_size"),
        layers=(Layer(mixer="mla", attn=attn, ffn=ffn, norm=norm),) * keys.size(config, "num_hidden_layers"),
        final_norm=norm,
        max_pos=keys.size(config, "max_position_embeddings", default=2048),
        tie=keys.flag(config, "tie_word_embeddings", default=False),
    )
    dense = config.get("first_k_dense_replace", 0)
    if type(dense) is not int or not 0 <= dense <= len(base.layers):
        raise keys.wrong("first_k_dense_replace", dense, f"a number from 0 to {len(base.layers)}")
    return with_experts(base, lambda i: moe if i >= dense else None)


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    moe = experts_of(value)
    return {
        **latent_config(value),
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "topk_method": "group_limited_greedy" if moe.n_group > 1 else "greedy",
        "aux_loss_alpha": moe.aux_coef,
    }


def latent_config(value: Spec) -> dict[str, Any]:
    """The keys of `latent` and `experts`."""
    attn, moe, ffn = value.attns[0], experts_of(value), value.layers[0].ffn
    mla, rope = attn.mla, attn.rope
    assert mla is not None and rope is not None and ffn is not None
    return {
        "hidden_size": value.d,
        "intermediate_size": ffn.d_ff,
        "num_hidden_layers": len(value.layers),
        "num_attention_heads": attn.n_head,
        "num_key_value_heads": attn.n_kv,
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_nope_head_dim": mla.nope,
        "qk_rope_head_dim": mla.rope,
        "v_head_dim": mla.v,
        "attention_bias": attn.qkv_bias,
        "hidden_act": llama.WRITTEN.get(ffn.act, ffn.act),
        "rms_norm_eps": value.layers[0].norm.eps,
        "max_position_embeddings": value.max_pos,
        "vocab_size": value.vocab,
        "tie_word_embeddings": value.tie,
        "first_k_dense_replace": sum(not (layer.ffn and layer.ffn.moe) for layer in value.layers),
        "moe_layer_freq": 1,
        "n_routed_experts": moe.n_expert,
        "n_shared_experts": moe.shared_ff // moe.d_ff,
        "moe_intermediate_size": moe.d_ff,
        "num_experts_per_tok": moe.top_k,
        "n_group": moe.n_group,
        "topk_group": moe.topk_group,
        "routed_scaling_factor": moe.scale,
        **llama.rope_config(rope),
    }
