"""Jamba (Lieber et al. 2024, arXiv:2403.19887): Mamba layers, every few layers attention without positions,
every few layers a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.families.mamba import rank
from caravan.model.families.mixtral import choices
from caravan.model.mixers import knobs
from caravan.model.spec import FFN, Attn, Layer, MoE, Norm, Spec

ARCHITECTURE = "JambaForCausalLM"
CLASSIFIER = "JambaForSequenceClassification"
CHECKPOINTS = ("ai21labs/Jamba-v0.1", "ai21labs/AI21-Jamba-1.5-*")

RULES = """
table jamba like olmoe s/.mlp./.feed_forward./
~.final_layernorm -> norm; @.pre_ff_layernorm -> n2; @.feed_forward.router -> ffn.router
@.mamba.{in_proj,conv1d,x_proj,dt_proj,A_log,D,out_proj} -> mix.{inp,conv,x,dt,A_log,D,out}
@.mamba.{dt,b,c}_layernorm -> mix.{dtn,bn,cn}
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    d, heads = keys.size(config, "hidden_size"), keys.size(config, "num_attention_heads")
    keys.refuse(config, "hidden_act", "silu", "swish")
    keys.refuse(config, "sliding_window")
    keys.refuse(config, "mamba_inner_layernorms", True)
    norm = Norm(kind="rms", eps=keys.real(config, "rms_norm_eps", default=1e-6))
    groups = keys.groups(config, heads)
    attn = Attn(
        n_head=heads,
        n_kv=groups,
        head_dim=keys.head_dim(d, heads, "num_attention_heads"),
    )
    ssm = knobs.Mamba(
        d_inner=keys.size(config, "mamba_expand", default=2) * d,
        d_state=keys.size(config, "mamba_d_state", default=16),
        d_conv=keys.size(config, "mamba_d_conv", default=4),
        dt_rank=rank(config, "mamba_dt_rank", d),
        bias=keys.flag(config, "mamba_proj_bias", default=False),
        conv_bias=keys.flag(config, "mamba_conv_bias", default=True),
        dt_norm=norm,
    )
    attends = _every(config, "attn_layer", 8, 4)
    routes = (
        _every(config, "expert_layer", 2, 1) if keys.size(config, "num_experts", default=16) > 1 else None
    )
    dense, mixed = _ffns(config)
    layers = [
        Layer(
            mixer="attn" if attends(i) else "mamba",
            attn=attn if attends(i) else None,
            ssm=None if attends(i) else ssm,
            ffn=mixed if routes and routes(i) else dense,
            norm=norm,
        )
        for i in range(keys.size(config, "num_hidden_layers"))
    ]
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=tuple(layers),
        final_norm=norm,
        max_pos=keys.size(config, "max_position_embeddings", default=262_144),
        tie=keys.flag(config, "tie_word_embeddings", default=False),
    )


def _ffns(config: Mapping[str, Any]) -> tuple[FFN, FFN]:
    """The dense FFN and the mixture of experts of the same width."""
    width = keys.size(config, "intermediate_size")
    experts = keys.size(config, "num_experts", default=16)
    moe = MoE(
        n_expert=experts,
        top_k=choices(config, "num_experts_per_tok", experts, 2) if experts > 1 else 1,
        d_ff=width,
        renorm=False,
        fp32_router=False,
        aux_coef=keys.real(config, "router_aux_loss_coef", default=0.001),
    )
    return FFN(kind="glu", d_ff=width, act="silu"), FFN(kind="moe", d_ff=width, act="silu", moe=moe)


def _every(config: Mapping[str, Any], name: str, period: int, offset: int) -> Any:
    """Whether a layer is one of those that come every `NAME_period` layers, from `NAME_offset` on."""
    period = keys.size(config, f"{name}_period", default=period)
    found, start = keys.find(config, (f"{name}_offset",), offset)
    if type(start) is not int or not 0 <= start < period:
        raise keys.wrong(found, start, f"a whole number below the period, {period}")
    return lambda i: i % period == start


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    attn, ssm = value.attns[0], next(layer.ssm for layer in value.layers if layer.ssm)
    moe = next((layer.ffn.moe for layer in value.layers if layer.ffn and layer.ffn.moe), None)
    attn_period, attn_offset = _pattern([layer.attn is not None for layer in value.layers])
    routed = [layer.ffn is not None and layer.ffn.moe is not None for layer in value.layers]
    expert_period, expert_offset = _pattern(routed) if moe else (2, 1)
    return {
        "vocab_size": value.vocab,
        "hidden_size": value.d,
        "num_hidden_layers": len(value.layers),
        "intermediate_size": value.layers[0].ffn.d_ff,  # type: ignore[union-attr]
        "num_attention_heads": attn.n_head,
        "num_key_value_heads": attn.n_kv,
        "rms_norm_eps": value.layers[0].norm.eps,
        "hidden_act": "silu",
        "attn_layer_period": attn_period,
        "attn_layer_offset": attn_offset,
        "expert_layer_period": expert_period,
        "expert_layer_offset": expert_offset,
        "num_experts": moe.n_expert if moe else 1,
        "num_experts_per_tok": moe.top_k if moe else 1,
        "router_aux_loss_coef": moe.aux_coef if moe else 0.001,
        "mamba_d_state": ssm.d_state,
        "mamba_d_conv": ssm.d_conv,
        "mamba_expand": ssm.d_inner // value.d,
        "mamba_dt_rank": ssm.dt_rank,
        "mamba_conv_bias": ssm.conv_bias,
        "mamba_proj_bias": ssm.bias,
        "max_position_embeddings": value.max_pos,
        "tie_word_embeddings": value.tie,
    }


def _pattern(chosen: list[bool]) -> tuple[int, int]:
    """(period, offset) of evenly spaced layers; a single one has a period as long as the model."""
    places = [i for i, yes in enumerate(chosen) if yes]
    return (places[1] - places[0] if len(places) > 1 else len(chosen)), places[0]
