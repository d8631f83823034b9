"""Qwen1.5-MoE and Qwen2-MoE (Qwen Team 2024, arXiv:2407.10671): many small experts whose weights are not
renormalised, and one shared expert behind a sigmoid gate; dense layers in between if asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import llama
from caravan.model.families.mixtral import choices, experts_of, with_experts
from caravan.model.spec import MoE, Spec
from caravan.types import UserError

ARCHITECTURE = "Qwen2MoeForCausalLM"
CLASSIFIER = "Qwen2MoeForSequenceClassification"
CHECKPOINTS = ("Qwen/Qwen1.5-MoE-A2.7B", "Qwen/Qwen2-57B-A14B")

RULES = """
table qwen2_moe like olmoe
@.mlp.shared_expert.{gate,up}_proj -> ffn.shared.inp : cat; @.mlp.shared_expert.down_proj -> ffn.shared.out
@.mlp.shared_expert_gate -> ffn.shared_gate
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    base = llama.spec({"num_key_value_heads": 16, **config, "attention_bias": False, "mlp_bias": False})
    bias = keys.flag(config, "qkv_bias", default=True)
    windows = _windows(config, len(base.layers))
    base = llama.with_attention(base, lambda i, attn: replace(attn, qkv_bias=bias, window=windows[i]))
    shared = keys.size(config, "shared_expert_intermediate_size", default=5632)
    moe = replace(experts(config, default=60, top_k=4), shared_ff=shared, shared_gate=True)
    return with_experts(base, lambda i: moe if sparse(config, i) else None)


def _windows(config: Mapping[str, Any], layers: int) -> list[int | None]:
    """Window of each layer, from `layer_types`: releases of the library have disagreed about which layers
    `max_window_layers` means, so it alone is not enough."""
    if not keys.flag(config, "use_sliding_window", default=False):
        return [None] * layers
    if not config.get("layer_types"):
        raise UserError(
            "config.json: 'use_sliding_window' is true but there is no 'layer_types'",
            "say for each layer: full_attention or sliding_attention",
        )
    size = llama.window(config, 4096)
    return [size if slides else None for slides in llama.layer_kinds(config, layers, bool)]


def experts(config: Mapping[str, Any], default: int, top_k: int, aux_coef: float = 0.001) -> MoE:
    """The knobs that Qwen2-MoE, Qwen3-MoE and OLMoE name alike."""
    count = keys.size(config, "num_experts", "num_local_experts", default=default)
    return MoE(
        n_expert=count,
        top_k=choices(config, "num_experts_per_tok", count, top_k),
        d_ff=keys.size(config, "moe_intermediate_size", "intermediate_size"),
        renorm=keys.flag(config, "norm_topk_prob", default=False),
        fp32_router=False,
        aux_coef=keys.real(config, "router_aux_loss_coef", default=aux_coef),
    )


def sparse(config: Mapping[str, Any], index: int) -> bool:
    """Whether a layer has experts: every `decoder_sparse_step`-th, `mlp_only_layers` left out."""
    step = keys.size(config, "decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise keys.wrong("mlp_only_layers", dense, "a list of layers")
    return (index + 1) % step == 0 and index not in dense


def expert_config(value: Spec) -> dict[str, Any]:
    """The keys of `experts` and `sparse`; dense layers are listed one by one."""
    moe = experts_of(value)
    return {
        "num_experts": moe.n_expert,
        "num_local_experts": moe.n_expert,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.d_ff,
        "norm_topk_prob": moe.renorm,
        "router_aux_loss_coef": moe.aux_coef,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, layer in enumerate(value.layers) if not (layer.ffn and layer.ffn.moe)],
    }


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = llama.config(value)
    del result["attention_bias"], result["mlp_bias"]
    windows = [attn.window for attn in value.attns]
    size = next((w for w in windows if w), None)
    return {
        **result,
        **expert_config(value),
        "shared_expert_intermediate_size": experts_of(value).shared_ff,
        "qkv_bias": value.attns[0].qkv_bias,
        "use_sliding_window": size is not None,
        "sliding_window": size,
        "layer_types": llama.written_kinds(value),
    }
