"""StripedHyena (Poli et al. 2023): Hyena layers and rotary attention in turns, gated FFNs, RMS norms.

The norm's eps is under the root, as in the fused kernel that the release asks for; its fallback adds eps to
the root, which differs by less than fp16 can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.mixers import knobs
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, RopeScaling, Spec

ARCHITECTURE = "StripedHyenaModelForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("togethercomputer/StripedHyena-Hessian-7B", "togethercomputer/StripedHyena-Nous-7B")

RULES = r"""
table stripedhyena @=backbone.blocks.{i} ~=backbone
prefix? backbone.
drop rotary_emb\.inv_freq$ \.filter\.t$
~.{embedding_layer,unembed} -> {embed,head}; ~.norm.scale -> norm.weight
@.{pre_norm,post_norm}.scale -> {n1,n2}.weight
@.inner_mha_cls.{Wqkv,out_proj} -> mix.{qkv,o}; @.{projections,out_filter_dense} -> mix.{inp,out}
@.filter.short_filter_{weight,bias} -> mix.conv.{weight,bias}
@.filter.{D,poles,residues} -> mix.{D,poles,residues}
@.mlp.{l1,l2} -> ffn.inp : cat; @.mlp.l3 -> ffn.out
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    d, heads = keys.size(config, "hidden_size"), keys.size(config, "num_attention_heads")
    keys.refuse(config, "hyena_filter_groups", 1)
    keys.refuse(config, "num_filters", d)
    keys.refuse(config, "smeared_gqa", False)
    keys.refuse(config, "final_norm", True)
    keys.refuse(config, "model_parallel_size", 1)
    groups = keys.size(config, "proj_groups", default=1)
    if heads % groups:
        raise keys.wrong("proj_groups", groups, f"a divisor of the number of heads, {heads}")
    width = keys.head_dim(d, heads, "num_attention_heads")
    norm = Norm(kind="rms", eps=keys.real(config, "eps"))
    attn = Attn(
        n_head=heads,
        n_kv=heads // groups,
        head_dim=width,
        qkv_bias=keys.flag(config, "qkv_proj_bias", default=True),
        o_bias=keys.flag(config, "mha_out_proj_bias", default=True),
        rope=_rope(config, width),
    )
    ssm = knobs.Hyena(
        n_head=heads,
        d_state=keys.size(config, "state_size"),
        d_conv=keys.size(config, "short_filter_length"),
        conv_bias=keys.flag(config, "short_filter_bias", default=True),
        column_split=keys.flag(config, "column_split_hyena", default=True),
    )
    act = keys.activation(config, "mlp_activation", default="silu")
    ffn = FFN(kind="glu", d_ff=_inner(config, d), act=act)
    count = keys.size(config, "num_layers")
    attends = _layers(config, count)
    layers = [
        Layer(mixer="attn", attn=attn, ffn=ffn, norm=norm)
        if i in attends
        else Layer(mixer="hyena", ssm=ssm, ffn=ffn, norm=norm)
        for i in range(count)
    ]
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=tuple(layers),
        final_norm=norm,
        max_pos=keys.size(config, "max_seqlen", default=8192),
        tie=keys.flag(config, "tie_embeddings", default=False),
    )


def _rope(config: Mapping[str, Any], width: int) -> Rope:
    theta = keys.real(config, "rotary_emb_base", default=10_000.0)
    if not keys.flag(config, "use_interpolated_rotary_pos_emb", default=False):
        return Rope(dim=width, theta=theta)
    factor = keys.real(config, "rotary_emb_scaling_factor", default=1.0)
    return Rope(dim=width, theta=theta, scaling=RopeScaling(kind="linear", factor=factor))


def _inner(config: Mapping[str, Any], d: int) -> int:
    """Width of the FFN: given, or 8/3 of the width rounded up to a multiple."""
    multiple = keys.size(config, "inner_size_multiple_of", default=64)
    return keys.size(config, "inner_mlp_size", default=-(-int(2 * d * 4 / 3) // multiple) * multiple)


def _layers(config: Mapping[str, Any], count: int) -> set[int]:
    """Layers with attention; the lists of the release run beyond the last layer."""

    def listed(name: str) -> set[int]:
        value = keys.find(config, (name,))[1]
        if not isinstance(value, list):
            raise keys.wrong(name, value, "a list of layers")
        return {i for i in value if type(i) is int and 0 <= i < count}

    attends, filters = listed("attn_layer_idxs"), listed("hyena_layer_idxs")
    if attends & filters or attends | filters != set(range(count)):
        raise keys.wrong("hyena_layer_idxs", sorted(filters), "every layer that 'attn_layer_idxs' leaves out")
    return attends


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    attn, ssm = value.attns[0], next(layer.ssm for layer in value.layers if layer.ssm)
    attends = [i for i, layer in enumerate(value.layers) if layer.attn]
    first = value.layers[0]
    assert attn.rope is not None and first.ffn is not None
    result = {
        "vocab_size": value.vocab,
        "hidden_size": value.d,
        "num_filters": value.d,
        "num_layers": len(value.layers),
        "attn_layer_idxs": attends,
        "hyena_layer_idxs": [i for i in range(len(value.layers)) if i not in attends],
        "num_attention_heads": attn.n_head,
        "proj_groups": attn.n_head // attn.n_kv,
        "qkv_proj_bias": attn.qkv_bias,
        "mha_out_proj_bias": attn.o_bias,
        "rotary_emb_base": attn.rope.theta,
        "use_interpolated_rotary_pos_emb": attn.rope.scaling is not None,
        "state_size": ssm.d_state,
        "short_filter_length": ssm.d_conv,
        "short_filter_bias": ssm.conv_bias,
        "column_split_hyena": ssm.column_split,
        "inner_mlp_size": first.ffn.d_ff,
        "mlp_activation": first.ffn.act,
        "eps": first.norm.eps,
        "max_seqlen": value.max_pos,
        "tie_embeddings": value.tie,
    }
    if attn.rope.scaling is not None:
        result["rotary_emb_scaling_factor"] = attn.rope.scaling.factor
    return result
