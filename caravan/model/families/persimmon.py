"""Persimmon (Adept 2023): squared ReLU, a layer norm on every query and key head, half of each head
rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.families import gpt_neox, llama
from caravan.model.spec import FFN, Attn, Layer, Norm, Spec

ARCHITECTURE = "PersimmonForCausalLM"
CLASSIFIER = "PersimmonForSequenceClassification"
CHECKPOINTS = ("adept/persimmon-8b-base", "adept/persimmon-8b-chat")

RULES = """
table @=model.layers.{i} ~=model
prefix? model.
drop rotary_emb
~.{embed_tokens,final_layernorm} -> {embed,norm}; lm_head -> head
@.{input,post_attention}_layernorm -> {n1,n2}
@.self_attn.query_key_value -> mix.qkv : grp
@.self_attn.{dense,q_layernorm,k_layernorm} -> mix.{o,qn,kn}
@.mlp.dense_{h_to_4h,4h_to_h} -> ffn.{inp,out}
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    d, heads = keys.size(config, "hidden_size"), keys.size(config, "num_attention_heads")
    width = keys.head_dim(d, heads, "num_attention_heads")
    norm = Norm(kind="layer", eps=keys.positive(config, "layer_norm_eps", default=1e-5), bias=True)
    attn = Attn(
        n_head=heads,
        n_kv=heads,
        head_dim=width,
        qkv_bias=True,
        o_bias=True,
        rope=gpt_neox.rope(config, width, whole=0.5),
        qk_norm=norm if keys.flag(config, "qk_layernorm", default=True) else None,
    )
    act = keys.activation(config, "hidden_act", default="relu2")
    layer = Layer(
        attn=attn,
        ffn=FFN(kind="mlp", d_ff=keys.size(config, "intermediate_size"), act=act, bias=True),
        norm=norm,
    )
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(layer,) * keys.size(config, "num_hidden_layers"),
        final_norm=norm,
        max_pos=keys.size(config, "max_position_embeddings", default=16384),
        tie=keys.flag(config, "tie_word_embeddings", default=False),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    first = value.layers[0]
    return {
        "hidden_size": value.d,
        "num_attention_heads": first.attn.n_head,
        "num_hidden_layers": len(value.layers),
        "intermediate_size": first.ffn.d_ff,
        "max_position_embeddings": value.max_pos,
        "vocab_size": value.vocab,
        "hidden_act": first.ffn.act,
        "layer_norm_eps": first.norm.eps,
        "qk_layernorm": first.attn.qk_norm is not None,
        "tie_word_embeddings": value.tie,
        **llama.rope_config(first.attn.rope, first.attn.head_dim),
    }
