"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): Mistral whose every FFN is a mixture of gated experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import llama
from caravan.model.spec import FFN, MoE, Spec
from caravan.types import UserError

ARCHITECTURE = "MixtralForCausalLM"
CLASSIFIER = "MixtralForSequenceClassification"
CHECKPOINTS = ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x22B-v0.1")

RULES = """
table mixtral like llama
- ffn.inp; - ffn.out; @.block_sparse_moe.gate -> ffn.router
@.block_sparse_moe.experts.{e}.{w1,w3}.weight -> ffn.xin : cat
@.block_sparse_moe.experts.{e}.w2.weight -> ffn.xout
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key. `router_jitter_noise` (training only) is not
    read."""
    keys.refuse(config, "attention_bias", False)
    keys.refuse(config, "mlp_bias", False)
    base = llama.spec({"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, **config})
    window = llama.window(config)
    experts = keys.size(config, "num_local_experts", "num_experts", default=8)
    moe = MoE(
        n_expert=experts,
        top_k=choices(config, "num_experts_per_tok", experts, 2),
        d_ff=base.layers[0].ffn.d_ff,  # type: ignore[union-attr]
        fp32_router=False,
        aux_coef=keys.real(config, "router_aux_loss_coef", default=0.001),
    )
    base = llama.with_attention(base, lambda i, attn: replace(attn, window=window))
    return with_experts(base, lambda i: moe)


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = llama.config(value)
    del result["attention_bias"], result["mlp_bias"]
    first = value.layers[0]
    moe = experts_of(value)
    return {
        **result,
        "intermediate_size": moe.d_ff,
        "num_local_experts": moe.n_expert,
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.aux_coef,
        "sliding_window": first.attn.window if first.attn else None,
    }


def choices(config: Mapping[str, Any], name: str, experts: int, default: Any = keys.MISSING) -> int:
    """How many experts a token chooses. Raises UserError when there are fewer."""
    result = keys.size(config, name, default=default)
    if result > experts:
        raise keys.wrong(name, result, f"at most the number of experts, {experts}")
    return result


def with_experts(value: Spec, moe: Callable[[int], MoE | None]) -> Spec:
    """The same Spec with moe(layer index) in place of the FFN of every layer for which it is not None. The
    FFN's own width stays on record beside the experts'."""
    layers = []
    for index, layer in enumerate(value.layers):
        knobs = moe(index)
        assert layer.ffn is not None
        ffn = (
            layer.ffn if knobs is None else FFN(kind="moe", d_ff=layer.ffn.d_ff, act=layer.ffn.act, moe=knobs)
        )
        layers.append(replace(layer, ffn=ffn))
    if not any(layer.ffn and layer.ffn.moe for layer in layers):
        raise UserError(
            "no layer of this mixture of experts has experts",
            "config.json: look at `mlp_only_layers`, `decoder_sparse_step` or `first_k_dense_replace`; "
            "a dense model has another model_type",
        )
    return replace(value, layers=tuple(layers))


def experts_of(value: Spec) -> MoE:
    """The knobs of the first layer with experts."""
    return next(layer.ffn.moe for layer in value.layers if layer.ffn and layer.ffn.moe)
