"""DBRX (Databricks 2024): 16 experts of which 4 are chosen, layer norms without bias, clipped projections.

All experts' matrices are stored as slabs [experts * width, d], the second one transposed. The rotary base is
read from `attn_config.rope_theta`, where the released files have it: transformers 5 overlooks it there and
takes `rope_parameters`, so we write both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.families import llama
from caravan.model.families.mixtral import choices, experts_of
from caravan.model.spec import FFN, Attn, Layer, MoE, Norm, Rope, Spec

ARCHITECTURE = "DbrxForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("databricks/dbrx-base", "databricks/dbrx-instruct")

RULES = """
table dbrx @=transformer.blocks.{i} ~=transformer
~.{wte,norm_f} -> {embed,norm}; lm_head -> head; @.norm_attn_norm.{norm_1,norm_2} -> {n1,n2}
@.norm_attn_norm.attn.{Wqkv,out_proj} -> mix.{qkv,o}; @.ffn.router.layer -> ffn.router
@.ffn.experts.mlp.{w1,v1} -> ffn.xin : ex; @.ffn.experts.mlp.w2 -> ffn.xout : exT
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    attention, feed = keys.table(config, "attn_config"), keys.table(config, "ffn_config")
    d = keys.size(config, "d_model", "hidden_size")
    heads = keys.size(config, "n_heads", "num_attention_heads")
    width, groups = keys.head_dim(d, heads, "n_heads"), keys.size(attention, "kv_n_heads", default=1)
    if heads % groups:
        raise keys.wrong("attn_config.kv_n_heads", groups, f"a divisor of the {heads} query heads")
    norm = Norm(kind="layer", eps=1e-5)
    attn = Attn(
        n_head=heads,
        n_kv=groups,
        head_dim=width,
        rope=Rope(dim=width, theta=theta(config)),
        clip_qkv=keys.real(attention, "clip_qkv") if attention.get("clip_qkv") is not None else None,
    )
    act = keys.table(feed, "ffn_act_fn")
    if set(act) - {"name"}:
        raise keys.unsupported("ffn_config.ffn_act_fn", dict(act), ['{"name": ...}'])
    inner = keys.size(feed, "ffn_hidden_size", default=3584)
    layer = Layer(
        attn=attn,
        ffn=FFN(
            kind="moe", d_ff=inner, act=keys.activation(act, "name", default="silu"), moe=_moe(feed, inner)
        ),
        norm=norm,
    )
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(layer,) * keys.size(config, "n_layers", "num_hidden_layers"),
        final_norm=norm,
        max_pos=keys.size(config, "max_seq_len", "max_position_embeddings", default=2048),
        tie=keys.flag(config, "tie_word_embeddings", default=False),
    )


def theta(config: Mapping[str, Any]) -> float:
    """The rotary base: attn_config.rope_theta, else rope_parameters.rope_theta, else 10000. Raises UserError
    for a scaled rotation."""
    values = keys.table(config, "rope_parameters")
    keys.refuse(values, "rope_type", "default")
    attention = keys.table(config, "attn_config")
    return keys.real(
        attention if attention.get("rope_theta") is not None else values, "rope_theta", default=1e4
    )


def _moe(feed: Mapping[str, Any], inner: int) -> MoE:
    """moe_normalize_expert_weights is the order of the norm that weights are divided by: 1 or none."""
    power = feed.get("moe_normalize_expert_weights", 1.0)
    if power is not None and power != 1:
        raise keys.unsupported("ffn_config.moe_normalize_expert_weights", power, [1.0, None])
    experts = keys.size(feed, "moe_num_experts", default=4)
    return MoE(
        n_expert=experts,
        top_k=choices(feed, "moe_top_k", experts, 1),
        d_ff=inner,
        renorm=power is not None,
        fp32_router=False,
        aux_coef=keys.real(feed, "moe_loss_weight", default=0.01),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    attn, ffn, moe = value.attns[0], value.layers[0].ffn, experts_of(value)
    assert ffn is not None and attn.rope is not None
    act = llama.WRITTEN.get(ffn.act, ffn.act)
    return {
        "d_model": value.d,
        "n_heads": attn.n_head,
        "n_layers": len(value.layers),
        "max_seq_len": value.max_pos,
        "vocab_size": value.vocab,
        "tie_word_embeddings": value.tie,
        "attn_config": {
            "kv_n_heads": attn.n_kv,
            "clip_qkv": attn.clip_qkv,
            "rope_theta": attn.rope.theta,
        },
        "ffn_config": {
            "ffn_hidden_size": moe.d_ff,
            "ffn_act_fn": {"name": act},
            "moe_num_experts": moe.n_expert,
            "moe_top_k": moe.top_k,
            "moe_normalize_expert_weights": 1.0 if moe.renorm else None,
            "moe_loss_weight": moe.aux_coef,
        },
        "rope_parameters": {"rope_type": "default", "rope_theta": attn.rope.theta},
    }
