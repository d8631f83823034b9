"""MPT (MosaicML 2023): ALiBi, layer norms without offset, no bias anywhere, optionally clipped queries, keys
and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.spec import FFN, Attn, Layer, Norm, Spec

ARCHITECTURE = "MptForCausalLM"
CLASSIFIER = "MptForSequenceClassification"
CHECKPOINTS = ("mosaicml/mpt-7b*", "mosaicml/mpt-30b*")

RULES = """
table @=transformer.blocks.{i} ~=transformer
prefix? transformer.
~.{wte,norm_f} -> {embed,norm}; lm_head -> head; @.{norm_1,norm_2} -> {n1,n2}
@.attn.{Wqkv,out_proj} -> mix.{qkv,o}; @.ffn.{up,down}_proj -> ffn.{inp,out}
"""


def attention(config: Mapping[str, Any], d: int) -> Attn:
    """The attention of attn_config. What transformers would silently ignore is refused."""
    values = keys.table(config, "attn_config")
    heads = keys.size(config, "n_heads", "num_attention_heads")
    width = keys.head_dim(d, heads, "n_heads")
    keys.refuse(values, "alibi", True)
    keys.refuse(values, "qk_ln", False)
    keys.refuse(values, "prefix_lm", False)
    keys.refuse(values, "attn_type", "multihead_attention")
    keys.refuse(values, "alibi_bias_max", 8, 8.0)
    clip = keys.real(values, "clip_qkv", default=0.0)
    if clip < 0:
        raise keys.wrong("clip_qkv", clip, "a number above 0, or 0 for none")
    return Attn(
        n_head=heads,
        n_kv=heads,
        head_dim=width,
        scale=keys.positive(values, "softmax_scale", default=width**-0.5),
        alibi=True,
        clip_qkv=clip or None,
    )


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    d = keys.size(config, "d_model", "hidden_size")
    keys.refuse(config, "no_bias", True)
    keys.refuse(config, "logit_scale")
    keys.refuse(config, "expansion_ratio", 4)
    keys.refuse(config, "embedding_fraction", 1.0, 1)
    keys.refuse(config, "norm_type", "low_precision_layernorm", "layernorm")
    norm = Norm(kind="layer", eps=keys.positive(config, "layer_norm_epsilon", default=1e-5))
    layer = Layer(attn=attention(config, d), ffn=FFN(kind="mlp", d_ff=4 * d, act="gelu"), norm=norm)
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(layer,) * keys.size(config, "n_layers", "num_hidden_layers"),
        final_norm=norm,
        max_pos=keys.size(config, "max_seq_len", default=2048),
        tie=keys.flag(config, "tie_word_embeddings", default=True),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    first = value.layers[0]
    attn = first.attn
    return {
        "d_model": value.d,
        "n_heads": attn.n_head,
        "n_layers": len(value.layers),
        "max_seq_len": value.max_pos,
        "vocab_size": value.vocab,
        "expansion_ratio": 4,
        "no_bias": True,
        "layer_norm_epsilon": first.norm.eps,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": 8,
            "clip_qkv": attn.clip_qkv,
            "softmax_scale": None if attn.scale == attn.head_dim**-0.5 else attn.scale,
        },
        "tie_word_embeddings": value.tie,
    }
