"""DeBERTa v2 and v3 (He et al. 2021, arXiv:2006.03654, 2111.09543): model/encoders/deberta.py, version 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.encoders.deberta import Conv, Deberta, DebertaSpec
from caravan.model.families import bert
from caravan.model.heads import Pool
from caravan.model.spec import FFN, Attn, Layer, Norm

MODEL_TYPE = "deberta-v2"
ARCHITECTURE = "DebertaV2Model"
CLASSIFIER = "DebertaV2ForSequenceClassification"
CHECKPOINTS = ("microsoft/deberta-v2-*", "microsoft/deberta-v3-*", "OpenAssistant/reward-model-deberta-*")
POOL = Pool(act="gelu", reads="first")
TERMS = ("c2p", "p2c")
MODULE = Deberta

RULES = r"""
table @=deberta.encoder.layer.{i} ~=deberta
prefix? deberta.
drop embeddings\.position_ids$
~.embeddings.{word_embeddings,position_embeddings,token_type_embeddings} -> {embed,pos,seg}
~.embeddings.{embed_proj,LayerNorm} -> {pin,embed_norm}
~.encoder.{rel_embeddings,LayerNorm,conv.conv,conv.LayerNorm} -> {rel,rel_norm,conv.conv,conv.norm}
@.attention.self.{query_proj,key_proj,value_proj} -> mix.proj : cat
@.attention.self.{pos_key_proj,pos_query_proj} -> mix.{pk,pq}
@.attention.output.{dense,LayerNorm} -> {mix.o,p1}
@.intermediate.dense -> ffn.inp; @.output.{dense,LayerNorm} -> {ffn.out,p2}
pooler.dense -> pool; classifier -> score
"""
KEPT = (
    r"^cls\.|^lm_predictions\.|^mask_predictions\.|^lm_head\.|^pooler\.|^classifier\.|^qa_outputs\."
    r"|embeddings\.position_embeddings\."
)
"""Heads that a use of the file may not need; positions that only the masked-language-model head reads."""
opened = bert.opened


def spec(config: Mapping[str, Any]) -> DebertaSpec:
    """config.json -> DebertaSpec. Raises UserError naming the key."""
    relative = keys.flag(config, "relative_attention", default=False)
    norms = _parts(config, "norm_rel_ebd", ("none", "layer_norm"))
    width = config.get("conv_kernel_size") or 0
    conv = None
    if width:
        conv = Conv(
            width=keys.size(config, "conv_kernel_size"),
            groups=keys.size(config, "conv_groups", default=1),
            act=keys.activation(config, "conv_act", default="tanh", tanh="tanh"),
        )
        if width % 2 == 0:
            raise keys.wrong("conv_kernel_size", width, "an odd number")
    buckets = config.get("position_buckets")
    return DebertaSpec(
        version=2,
        **common(config),
        buckets=buckets if relative and type(buckets) is int and buckets > 0 else 0,
        share_att_key=relative and keys.flag(config, "share_att_key", default=False),
        rel_norm=relative and "layer_norm" in norms,
        conv=conv,
    )


def _parts(config: Mapping[str, Any], name: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """A list, or words joined by '|', all of them known; in the order of `known`."""
    value = config.get(name) or []
    words = value.lower().split("|") if isinstance(value, str) else value
    if not isinstance(words, list):
        raise keys.wrong(name, value, "words")
    found = [str(word).strip() for word in words if str(word).strip()]
    for word in found:
        if word not in known:
            raise keys.unsupported(name, word, known)
    return tuple(word for word in known if word in found)


def common(config: Mapping[str, Any]) -> dict[str, Any]:
    """What both versions share."""
    d, heads = keys.size(config, "hidden_size"), keys.size(config, "num_attention_heads")
    head_dim = keys.head_dim(d, heads, "num_attention_heads")
    keys.refuse(config, "attention_head_size", head_dim)
    keys.refuse(config, "pooler_hidden_size", d)
    keys.refuse(config, "pooler_hidden_act", "gelu")
    norm = Norm(kind="layer", eps=keys.real(config, "layer_norm_eps", default=1e-7), bias=True)
    act = keys.activation(config, "hidden_act", default="gelu")
    layer = Layer(
        attn=Attn(n_head=heads, n_kv=heads, head_dim=head_dim, qkv_bias=True, o_bias=True, causal=False),
        ffn=FFN(kind="mlp", d_ff=keys.size(config, "intermediate_size"), act=act, bias=True),
        norm=norm,
        pre=False,
        post="sum",
    )
    max_pos = keys.size(config, "max_position_embeddings", default=512)
    furthest = config.get("max_relative_positions")
    furthest = furthest if type(furthest) is int and furthest > 0 else max_pos
    narrow = keys.size(config, "embedding_size", default=d)
    types = config.get("type_vocab_size") or 0
    return {
        "vocab": keys.size(config, "vocab_size"),
        "d": d,
        "layers": (layer,) * keys.size(config, "num_hidden_layers"),
        "norm": norm,
        "max_pos": max_pos,
        "pos": keys.flag(config, "position_biased_input", default=True),
        "type_vocab": keys.size(config, "type_vocab_size") if types else 0,
        "embed_dim": 0 if narrow == d else narrow,
        "max_relative": furthest if keys.flag(config, "relative_attention", default=False) else 0,
        "terms": _parts(config, "pos_att_type", TERMS),
        "tie": keys.flag(config, "tie_word_embeddings", default=True),
    }


def config(value: DebertaSpec) -> dict[str, Any]:
    """DebertaSpec -> config.json."""
    result = common_config(value) | {
        "position_buckets": value.buckets or -1,
        "share_att_key": value.share_att_key,
        "norm_rel_ebd": "layer_norm" if value.rel_norm else "none",
    }
    if value.conv is not None:
        result |= {
            "conv_kernel_size": value.conv.width,
            "conv_groups": value.conv.groups,
            "conv_act": value.conv.act,
        }
    return result


def common_config(value: DebertaSpec) -> dict[str, Any]:
    """What both versions share."""
    first = value.layers[0]
    assert first.attn is not None and first.ffn is not None
    narrow = {"embedding_size": value.embed_dim} if value.embed_dim else {}
    return narrow | {
        "hidden_size": value.d,
        "num_attention_heads": first.attn.n_head,
        "num_hidden_layers": len(value.layers),
        "intermediate_size": first.ffn.d_ff,
        "hidden_act": first.ffn.act,
        "layer_norm_eps": value.norm.eps,
        "max_position_embeddings": value.max_pos,
        "max_relative_positions": value.max_relative or -1,
        "relative_attention": value.max_relative > 0,
        "pos_att_type": list(value.terms),
        "position_biased_input": value.pos,
        "type_vocab_size": value.type_vocab,
        "vocab_size": value.vocab,
        "tie_word_embeddings": value.tie,
    }
