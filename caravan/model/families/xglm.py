"""XGLM (Lin et al. 2021, arXiv:2112.10668): sinusoidal positions counted from 2, embedding times sqrt(d)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.spec import FFN, Attn, Layer, Norm, Spec

ARCHITECTURE = "XGLMForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("facebook/xglm-564M", "facebook/xglm-7.5B")

RULES = """
table @=model.layers.{i} ~=model
prefix? model.
drop embed_positions
~.{embed_tokens,layer_norm} -> {embed,norm}; lm_head -> head
@.{self_attn_layer_norm,final_layer_norm} -> {n1,n2}
@.self_attn.{q,k,v}_proj -> mix.qkv : cat; @.self_attn.out_proj -> mix.o; @.{fc1,fc2} -> ffn.{inp,out}
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    d, heads = keys.size(config, "d_model", "hidden_size"), keys.size(config, "attention_heads")
    keys.refuse(config, "add_cross_attention", False)
    norm = Norm(kind="layer", eps=1e-5, bias=True)
    act = keys.activation(config, "activation_function", default="gelu")
    width = keys.head_dim(d, heads, "attention_heads")
    layer = Layer(
        attn=Attn(n_head=heads, n_kv=heads, head_dim=width, qkv_bias=True, o_bias=True),
        ffn=FFN(kind="mlp", d_ff=keys.size(config, "ffn_dim"), act=act, bias=True),
        norm=norm,
    )
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(layer,) * keys.size(config, "num_layers", "num_hidden_layers"),
        final_norm=norm,
        max_pos=keys.size(config, "max_position_embeddings", default=2048),
        pos="sinusoid",
        pos_offset=2,
        embed_scale=d**0.5 if keys.flag(config, "scale_embedding", default=True) else 1.0,
        tie=keys.flag(config, "tie_word_embeddings", default=True),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    first = value.layers[0]
    return {
        "d_model": value.d,
        "attention_heads": first.attn.n_head,
        "num_layers": len(value.layers),
        "ffn_dim": first.ffn.d_ff,
        "max_position_embeddings": value.max_pos,
        "vocab_size": value.vocab,
        "activation_function": first.ffn.act,
        "scale_embedding": value.embed_scale != 1.0,
        "tie_word_embeddings": value.tie,
    }
