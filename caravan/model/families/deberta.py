"""DeBERTa v1 (He et al. 2021, arXiv:2006.03654): model/encoders/deberta.py, version 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.encoders.deberta import Deberta, DebertaSpec
from caravan.model.families import bert, deberta_v2
from caravan.model.heads import Pool

ARCHITECTURE = "DebertaModel"
CLASSIFIER = "DebertaForSequenceClassification"
CHECKPOINTS = ("microsoft/deberta-base", "microsoft/deberta-large", "microsoft/deberta-xlarge")
POOL = Pool(act="gelu", reads="first")
MODULE = Deberta

RULES = r"""
table @=deberta.encoder.layer.{i} ~=deberta
prefix? deberta.
drop embeddings\.position_ids$
~.embeddings.{word_embeddings,position_embeddings,token_type_embeddings} -> {embed,pos,seg}
~.embeddings.{embed_proj,LayerNorm} -> {pin,embed_norm}
~.encoder.rel_embeddings -> rel
@.attention.self.in_proj -> mix.qkv : grp
@.attention.self.{q_bias,v_bias,pos_proj,pos_q_proj} -> mix.{q_bias,v_bias,pk,pq}
@.attention.output.{dense,LayerNorm} -> {mix.o,p1}
@.intermediate.dense -> ffn.inp; @.output.{dense,LayerNorm} -> {ffn.out,p2}
pooler.dense -> pool; classifier -> score
"""
KEPT = deberta_v2.KEPT
opened = bert.opened


def spec(config: Mapping[str, Any]) -> DebertaSpec:
    """config.json -> DebertaSpec. Raises UserError naming the key."""
    keys.refuse(config, "talking_head", False)
    return DebertaSpec(version=1, **deberta_v2.common(config))


def config(value: DebertaSpec) -> dict[str, Any]:
    """DebertaSpec -> config.json."""
    return deberta_v2.common_config(value)
