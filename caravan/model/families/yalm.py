"""YaLM-100B (Yandex 2022): a narrow embedding, normalised and filled up with zeros; pre-norm layers of which
the first has no norm before its attention; gated exact GELU with biases; a way out of dense, GELU and norm to
the tied head with its own bias.

The names are those of the original program's modules. The release holds pickles cut over several machines:
they must be merged and written as safetensors first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, Spec

ARCHITECTURE = "YalmForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("yandex/yalm-100b",)
RULES = """
table yalm @=language_model.transformer.layers.{i} ~=language_model
prefix? language_model.
~.embedding.word_embeddings -> embed; ~.projector.input_layernorm -> embed_norm
~.output_layer.{input_layer_norm,dense,output_layer_norm} -> {norm,pout.dense,pout.norm}
~.output_layer.output_bias -> tied_bias
@.{input,post_attention}_layernorm -> {n1,n2}
@.attention.query_key_value -> mix.qkv : grp; @.attention.dense -> mix.o
@.mlp.{dense_ffn_hidden,dense_ffn_gate} -> ffn.inp : cat; @.mlp.dense_ffn_output -> ffn.out
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json with the names of the original program's arguments -> Spec. Raises UserError naming the
    key."""
    keys.refuse(config, "apply_residual_connection_post_layernorm", False)
    keys.refuse(config, "pos_encoding_type", "rotary")
    keys.refuse(config, "activation_type", "geglu")
    d, heads = keys.size(config, "hidden_size"), keys.size(config, "num_attention_heads")
    width = keys.head_dim(d, heads, "num_attention_heads")
    norm = Norm(kind="layer", eps=keys.real(config, "layernorm_epsilon", default=1e-5), bias=True)
    rope = keys.even(Rope(dim=width), "num_attention_heads")
    attn = Attn(n_head=heads, n_kv=heads, head_dim=width, qkv_bias=True, o_bias=True, rope=rope)
    ffn = FFN(kind="glu", d_ff=keys.size(config, "intermediate_size"), act="gelu", bias=True)
    layer = Layer(attn=attn, ffn=ffn, norm=norm)
    first = replace(layer, pre_mixer=False)
    return Spec(
        vocab=keys.size(config, "padded_vocab_size", "vocab_size"),
        d=d,
        layers=(first,) + (layer,) * (keys.size(config, "num_layers") - 1),
        final_norm=norm,
        max_pos=keys.size(config, "max_position_embeddings", default=2048),
        embed_dim=keys.size(config, "embedding_size"),
        embed_pad=True,
        embed_norm=norm,
        head_act="gelu",
        head_bias=True,
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    layer = value.layers[0]
    return {
        "hidden_size": value.d,
        "embedding_size": value.embed_dim,
        "intermediate_size": layer.ffn.d_ff,
        "num_layers": len(value.layers),
        "num_attention_heads": layer.attn.n_head,
        "max_position_embeddings": value.max_pos,
        "padded_vocab_size": value.vocab,
        "layernorm_epsilon": layer.norm.eps,
        "activation_type": "geglu",
        "pos_encoding_type": "rotary",
        "apply_residual_connection_post_layernorm": False,
    }
