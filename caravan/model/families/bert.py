"""BERT (Devlin et al. 2019, arXiv:1810.04805): an encoder with norms after the sums, learned positions and
segment types. The backbone of classifiers and reward models: the state of the first token is pooled.

Other heads of a file (masked language model, next sentence) are kept beside the weights and written back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from caravan.model import keys
from caravan.model.heads import Pool
from caravan.model.spec import FFN, Attn, Layer, Norm, Spec
from caravan.model.tensors import Renamed

ARCHITECTURE = "BertModel"
CLASSIFIER = "BertForSequenceClassification"
CHECKPOINTS = ("google-bert/bert-*", "bert-base-*", "hfl/chinese-bert-*")
POOL = Pool(act="tanh", reads="first")

RULES = r"""
table @=bert.encoder.layer.{i} ~=bert
prefix? bert.
drop embeddings\.position_ids$
~.embeddings.{word_embeddings,position_embeddings,token_type_embeddings} -> {embed,pos,seg}
~.embeddings.LayerNorm -> embed_norm
@.attention.self.{query,key,value} -> mix.qkv : cat; @.attention.output.{dense,LayerNorm} -> {mix.o,p1}
@.intermediate.dense -> ffn.inp; @.output.{dense,LayerNorm} -> {ffn.out,p2}
~.pooler.dense -> pool; classifier -> score
"""
KEPT = r"^cls\.|(^|\.)pooler\.dense\.|^classifier\.|^qa_outputs\."
"""Heads that a use of the file may not need."""


def opened(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Early files call the gain and the offset of a norm gamma and beta; we write them as weight and bias."""
    modern = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    ends = re.compile(r"LayerNorm\.(gamma|beta)$")
    return Renamed(tensors, lambda key: ends.sub(lambda found: modern[found[0]], key))


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    return encoder(config, offset=0, eps=1e-12, types=2)


def encoder(config: Mapping[str, Any], offset: int, eps: float, types: int) -> Spec:
    """What BERT and RoBERTa share; `eps` and `types` are the library's defaults."""
    d, heads = keys.size(config, "hidden_size"), keys.size(config, "num_attention_heads")
    keys.refuse(config, "position_embedding_type", "absolute")
    keys.refuse(config, "is_decoder", False)
    keys.refuse(config, "add_cross_attention", False)
    norm = Norm(kind="layer", eps=keys.real(config, "layer_norm_eps", default=eps), bias=True)
    attn = Attn(
        n_head=heads,
        n_kv=heads,
        head_dim=keys.head_dim(d, heads, "num_attention_heads"),
        qkv_bias=True,
        o_bias=True,
        causal=False,
    )
    act = keys.activation(config, "hidden_act", default="gelu")
    ffn = FFN(kind="mlp", d_ff=keys.size(config, "intermediate_size"), act=act, bias=True)
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(Layer(attn=attn, ffn=ffn, norm=norm, pre=False, post="sum"),)
        * keys.size(config, "num_hidden_layers"),
        final_norm=None,
        max_pos=keys.size(config, "max_position_embeddings", default=512 + offset) - offset,
        pos="learned",
        pos_offset=offset,
        embed_norm=norm,
        type_vocab=keys.size(config, "type_vocab_size", default=types),
        tie=keys.flag(config, "tie_word_embeddings", default=True),
        head=False,
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    first = value.layers[0]
    assert first.attn is not None and first.ffn is not None
    return {
        "hidden_size": value.d,
        "num_attention_heads": first.attn.n_head,
        "num_hidden_layers": len(value.layers),
        "intermediate_size": first.ffn.d_ff,
        "hidden_act": first.ffn.act,
        "layer_norm_eps": first.norm.eps,
        "max_position_embeddings": value.max_pos + value.pos_offset,
        "type_vocab_size": value.type_vocab,
        "vocab_size": value.vocab,
        "tie_word_embeddings": value.tie,
    }
