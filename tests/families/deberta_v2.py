"""DeBERTa v2 and v3: logarithmic buckets, shared projections, the convolution of the largest."""

from __future__ import annotations

from tests.families import Case, tiny, wrong_ffn, wrong_spec
from tests.families.bert import bare, classifier
from tests.families.deberta import DEBERTA

V3 = DEBERTA | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
P2C = DEBERTA | {
    "pos_att_type": "p2c",
    "position_buckets": 6,
    "max_relative_positions": 30,
    "conv_kernel_size": 3,
    "conv_groups": 2,
}
V2 = DEBERTA | {"conv_kernel_size": 3, "conv_act": "gelu", "max_relative_positions": 12}

CASES: list[Case] = [
    classifier(
        name="deberta-v3-reward",
        hf=tiny("DebertaV2Config", "DebertaV2ForSequenceClassification", V3 | {"num_labels": 1}),
        wrong=wrong_ffn(act="gelu_new"),
    ),
    classifier(
        name="deberta-v3-labels",
        hf=tiny("DebertaV2Config", "DebertaV2ForSequenceClassification", V3 | {"num_labels": 3}),
        wrong=wrong_spec(max_relative=32),
    ),
    bare(
        name="deberta-v2-conv",
        hf=tiny("DebertaV2Config", "DebertaV2Model", V2),
        wrong=wrong_spec(conv=None),
    ),
    bare(
        name="deberta-v2-p2c",
        hf=tiny(
            "DebertaV2Config",
            "DebertaV2Model",
            P2C,
        ),
        wrong=wrong_spec(terms=()),
    ),
]
