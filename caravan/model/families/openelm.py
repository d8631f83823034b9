"""OpenELM (Mehta et al. 2024, arXiv:2404.14619): Llama with norms on queries and keys, whose heads and inner
widths grow from layer to layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, Spec

ARCHITECTURE = "OpenELMForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("apple/OpenELM-270M*", "apple/OpenELM-450M*", "apple/OpenELM-1_1B*", "apple/OpenELM-3B*")
RULES = """
table openelm @=transformer.layers.{i} ~=transformer
drop rotary
~.{token_embeddings,norm} -> {embed,norm}; lm_head -> head; @.{attn,ffn}_norm -> {n1,n2}
@.attn.{qkv_proj,out_proj,q_norm,k_norm} -> mix.{qkv,o,qn,kn}; @.ffn.{proj_1,proj_2} -> ffn.{inp,out}
"""


def divisible(value: float, unit: int) -> int:
    """The multiple of `unit` nearest to value, one more if that loses more than a tenth of it."""
    near = max(unit, int(value + unit / 2) // unit * unit)
    return near + unit if near < 0.9 * value else near


def per_layer(config: Mapping[str, Any], name: str, layers: int) -> list[Any]:
    """A list with one entry per layer, from a list or one number for all. Raises UserError naming the key."""
    value = keys.find(config, (name,))[1]
    result = value if isinstance(value, list) else [value] * layers
    if len(result) != layers or not all(type(x) in (int, float) and 0 < x < keys.MOST for x in result):
        raise keys.wrong(name, value, f"{layers} positive numbers")
    return result


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    keys.refuse(config, "ffn_with_glu", True)
    keys.refuse(config, "normalization_layer_name", "rms_norm")
    d, width = keys.size(config, "model_dim"), keys.size(config, "head_dim")
    count = keys.size(config, "num_transformer_layers")
    unit = keys.size(config, "ffn_dim_divisor", default=256)
    norm = Norm(eps=1e-6)
    normed = keys.flag(config, "normalize_qk_projections", default=True)
    rope = Rope(dim=width, theta=keys.real(config, "rope_freq_constant", default=1e4), fp32=True)
    act = keys.activation(config, "activation_fn_name", default="swish")
    heads, groups, ratios = (
        per_layer(config, name, count) for name in ("num_query_heads", "num_kv_heads", "ffn_multipliers")
    )
    layers = []
    for H, K, ratio in zip(heads, groups, ratios, strict=True):
        if H % K:
            raise keys.wrong("num_kv_heads", K, f"a divisor of the layer's {H} query heads")
        attn = Attn(n_head=H, n_kv=K, head_dim=width, rope=rope, qk_norm=norm if normed else None)
        ffn = FFN(kind="glu", d_ff=divisible(ratio * d, unit), act=act)
        layers.append(Layer(attn=attn, ffn=ffn, norm=norm))
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=tuple(layers),
        final_norm=norm,
        max_pos=keys.size(config, "max_context_length", default=2048),
        tie=keys.flag(config, "share_input_output_layers", default=True),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json. The widths are written as multiples of d that lead to them again."""
    first = value.layers[0]
    return {
        "model_dim": value.d,
        "head_dim": first.attn.head_dim,
        "num_transformer_layers": len(value.layers),
        "num_query_heads": [attn.n_head for attn in value.attns],
        "num_kv_heads": [attn.n_kv for attn in value.attns],
        "ffn_multipliers": [layer.ffn.d_ff / value.d for layer in value.layers],
        "ffn_dim_divisor": 1,
        "normalize_qk_projections": first.attn.qk_norm is not None,
        "rope_freq_constant": first.attn.rope.theta,
        "activation_fn_name": {"silu": "swish"}.get(first.ffn.act, first.ffn.act),
        "vocab_size": value.vocab,
        "max_context_length": value.max_pos,
        "share_input_output_layers": value.tie,
    }
