"""BLOOM (BigScience 2022, arXiv:2211.05100): ALiBi instead of positions, a norm behind the embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.spec import FFN, Attn, Layer, Norm, Spec

ARCHITECTURE = "BloomForCausalLM"
CLASSIFIER = "BloomForSequenceClassification"
CHECKPOINTS = (
    "bigscience/bloom*",
    "bigscience/bloomz*",
    "TigerResearch/tigerbot-7b-*-v1",
    "BelleGroup/BELLE-7B-*",
)

RULES = """
table @=transformer.h.{i} ~=transformer
prefix? transformer.
~.{word_embeddings,word_embeddings_layernorm,ln_f} -> {embed,embed_norm,norm}; lm_head -> head
@.{input,post_attention}_layernorm -> {n1,n2}
@.self_attention.query_key_value -> mix.qkv : grp; @.self_attention.dense -> mix.o
@.mlp.dense_{h_to_4h,4h_to_h} -> ffn.{inp,out}
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec; `seq_length` is a note of the trainer, ALiBi itself has no end.

    Raises UserError naming the key.
    """
    d = keys.size(config, "n_embed", "hidden_size")
    heads = keys.size(config, "n_head", "num_attention_heads")
    norm = Norm(kind="layer", eps=keys.positive(config, "layer_norm_epsilon", default=1e-5), bias=True)
    width = keys.head_dim(d, heads, "n_head")
    keys.refuse(config, "n_inner", 4 * d)
    layer = Layer(
        attn=Attn(n_head=heads, n_kv=heads, head_dim=width, qkv_bias=True, o_bias=True, alibi=True),
        ffn=FFN(kind="mlp", d_ff=4 * d, act="gelu_new", bias=True),
        norm=norm,
        res_from_norm=keys.flag(config, "apply_residual_connection_post_layernorm", default=False),
    )
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(layer,) * keys.size(config, "n_layer", "num_hidden_layers"),
        final_norm=norm,
        embed_norm=norm,
        max_pos=keys.size(config, "seq_length", default=2048),
        tie=keys.flag(config, "tie_word_embeddings", default=True),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    first = value.layers[0]
    return {
        "hidden_size": value.d,
        "n_embed": value.d,
        "n_head": first.attn.n_head,
        "n_layer": len(value.layers),
        "seq_length": value.max_pos,
        "vocab_size": value.vocab,
        "layer_norm_epsilon": first.norm.eps,
        "apply_residual_connection_post_layernorm": first.res_from_norm,
        "tie_word_embeddings": value.tie,
    }
