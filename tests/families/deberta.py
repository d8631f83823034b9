"""DeBERTa v1: fused per-head projection, a clamped table of relative positions."""

from __future__ import annotations

from tests.families import Case, tiny, wrong_ffn, wrong_spec
from tests.families.bert import ENCODER, bare, classifier

SHORT = {
    "max_relative_positions": 9,
    "embedding_size": 20,
    "position_biased_input": True,
    "type_vocab_size": 2,
}
DEBERTA = ENCODER | {
    "relative_attention": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
    "pos_att_type": ["c2p", "p2c"],
}

CASES: list[Case] = [
    classifier(
        name="deberta-reward",
        hf=tiny("DebertaConfig", "DebertaForSequenceClassification", DEBERTA | {"num_labels": 1}),
        wrong=wrong_ffn(act="gelu_new"),
    ),
    bare(
        name="deberta-short-table",
        hf=tiny(
            "DebertaConfig",
            "DebertaModel",
            DEBERTA | SHORT,
        ),
        wrong=wrong_spec(pos=False),
    ),
    bare(
        name="deberta-c2p",
        hf=tiny("DebertaConfig", "DebertaModel", DEBERTA | {"pos_att_type": "c2p"}),
        wrong=wrong_spec(terms=()),
    ),
    bare(
        name="deberta-absolute",
        hf=tiny(
            "DebertaConfig",
            "DebertaModel",
            DEBERTA | {"relative_attention": False, "position_biased_input": True, "pos_att_type": None},
        ),
        wrong=wrong_spec(terms=("c2p",)),
    ),
]
