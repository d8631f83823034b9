"""Falcon (Almazrouei et al. 2023, arXiv:2311.16867): four shapes under one name.

7B: one key/value head, attention and MLP side by side behind one norm. 40B and 180B: key/value groups, two
norms side by side. 11B: groups, one norm. RW: ALiBi, full heads, biases, one sublayer after the other. The
ALiBi of RW is part of the score before its division by sqrt(head width), and is kept exact here; transformers
rounds slope * position to bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.families import gpt_neox, llama
from caravan.model.spec import FFN, Attn, Layer, Norm, Spec

ARCHITECTURE = "FalconForCausalLM"
CLASSIFIER = "FalconForSequenceClassification"
ALIASES = ("RefinedWeb", "RefinedWebModel")
CHECKPOINTS = (
    "tiiuae/falcon-7b*",
    "tiiuae/falcon-40b*",
    "tiiuae/falcon-180B*",
    "tiiuae/falcon-11B",
    "tiiuae/falcon-rw-*",
)

RULES = """
table @=transformer.h.{i} ~=transformer
prefix? transformer.
drop rotary
~.{word_embeddings,ln_f} -> {embed,norm}; lm_head -> head
[par2] @.{ln_attn,ln_mlp} -> {n1,n2}
[not par2] @.input_layernorm -> n1; [seq] @.post_attention_layernorm -> n2
@.self_attention.query_key_value -> mix.qkv : grp; @.self_attention.dense -> mix.o
@.mlp.dense_{h_to_4h,4h_to_h} -> ffn.{inp,out}
"""


def groups(config: Mapping[str, Any], heads: int, new: bool) -> int:
    """Key/value heads. Before the new architecture there is one, or as many as there are queries."""
    if not new:
        return 1 if keys.flag(config, "multi_query", default=True) else heads
    count = keys.size(config, "num_kv_heads", "n_head_kv", default=heads)
    if heads % count:
        raise keys.wrong("num_kv_heads", count, f"a divisor of the {heads} query heads")
    return count


def norms(config: Mapping[str, Any], new: bool) -> int:
    """How many norms stand before sublayers that run side by side."""
    count = keys.size(config, "num_ln_in_parallel_attn", default=2 if new else 1)
    if count > (2 if new else 1):
        raise keys.unsupported("num_ln_in_parallel_attn", count, (1, 2) if new else (1,))
    return count


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec; the first releases (model_type RefinedWeb) are read too.

    Raises UserError naming the key.
    """
    d = keys.size(config, "hidden_size", "n_embed")
    heads = keys.size(config, "num_attention_heads", "n_head")
    width = keys.head_dim(d, heads, "num_attention_heads")
    new = keys.flag(config, "new_decoder_architecture", default=config.get("model_type") == "RefinedWeb")
    parallel = keys.flag(config, "parallel_attn", default=True)
    if new and not parallel:
        raise keys.unsupported("parallel_attn", False, ["true, with new_decoder_architecture"])
    alibi, bias = keys.flag(config, "alibi", default=False), keys.flag(config, "bias", default=False)
    norm = Norm(kind="layer", eps=keys.positive(config, "layer_norm_epsilon", default=1e-5), bias=True)
    attn = Attn(
        n_head=heads,
        n_kv=groups(config, heads, new),
        head_dim=width,
        qkv_bias=bias,
        o_bias=bias,
        rope=None if alibi else gpt_neox.rope(config, width),
        alibi=alibi,
        alibi_scale=width**-0.5 if alibi else 1.0,
    )
    act = keys.activation(config, "activation", default="gelu")
    layer = Layer(
        attn=attn,
        ffn=FFN(kind="mlp", d_ff=keys.size(config, "ffn_hidden_size", default=4 * d), act=act, bias=bias),
        norm=norm,
        parallel=parallel,
        shared_norm=parallel and norms(config, new) == 1,
    )
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(layer,) * keys.size(config, "num_hidden_layers", "n_layer"),
        final_norm=norm,
        max_pos=keys.size(config, "max_position_embeddings", default=2048),
        tie=keys.flag(config, "tie_word_embeddings", default=True),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    first = value.layers[0]
    heads, groups = first.attn.n_head, first.attn.n_kv
    new = first.parallel and (not first.shared_norm or groups not in (1, heads))
    return {
        "hidden_size": value.d,
        "num_attention_heads": heads,
        "num_kv_heads": groups if new else heads,
        "num_hidden_layers": len(value.layers),
        "ffn_hidden_size": first.ffn.d_ff,
        "max_position_embeddings": value.max_pos,
        "vocab_size": value.vocab,
        "activation": first.ffn.act,
        "layer_norm_epsilon": first.norm.eps,
        "alibi": first.attn.alibi,
        "bias": first.ffn.bias,
        "multi_query": new or groups == 1,
        "new_decoder_architecture": new,
        "parallel_attn": first.parallel,
        "num_ln_in_parallel_attn": (1 if first.shared_norm else 2) if new else None,
        "tie_word_embeddings": value.tie,
        **llama.rope_config(first.attn.rope, first.attn.head_dim),
    }
