"""RoBERTa (Liu et al. 2019, arXiv:1907.11692): BERT with positions counted from the padding id + 1, one
segment type and a two-layer classifier on the first token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.families import bert
from caravan.model.heads import Pool
from caravan.model.spec import Spec

ARCHITECTURE = "RobertaModel"
CLASSIFIER = "RobertaForSequenceClassification"
ALIASES = ("xlm-roberta", "camembert")
CHECKPOINTS = ("FacebookAI/roberta-*", "FacebookAI/xlm-roberta-*", "almanach/camembert-*")
POOL = Pool(act="tanh", reads="first")

RULES = r"""
table @=roberta.encoder.layer.{i} ~=roberta
prefix? roberta.
drop embeddings\.position_ids$
~.embeddings.{word_embeddings,position_embeddings,token_type_embeddings} -> {embed,pos,seg}
~.embeddings.LayerNorm -> embed_norm
@.attention.self.{query,key,value} -> mix.qkv : cat; @.attention.output.{dense,LayerNorm} -> {mix.o,p1}
@.intermediate.dense -> ffn.inp; @.output.{dense,LayerNorm} -> {ffn.out,p2}
classifier.{dense,out_proj} -> {pool,score}
"""
KEPT = r"^lm_head\.|(^|\.)pooler\.dense\.|^classifier\.|^qa_outputs\."
"""Heads that a use of the file may not need. The pooler of the bare model is none of the classifier's."""
opened = bert.opened


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    pad = keys.find(config, ("pad_token_id",), 1)[1]
    if type(pad) is not int or pad < 0:
        raise keys.wrong("pad_token_id", pad, "a token id")
    return bert.encoder(config, offset=pad + 1, eps=1e-12, types=2)


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    return {**bert.config(value), "pad_token_id": value.pos_offset - 1}
