"""RoBERTa: positions from the padding id + 1, a two-layer classifier."""

from __future__ import annotations

from tests.families import Case, tiny, wrong_ffn, wrong_spec
from tests.families.bert import ENCODER, bare, classifier

ROBERTA = ENCODER | {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
PAD_2 = ROBERTA | {"pad_token_id": 2}

CASES: list[Case] = [
    classifier(
        name="roberta-reward",
        hf=tiny("RobertaConfig", "RobertaForSequenceClassification", ROBERTA | {"num_labels": 1}),
        wrong=wrong_spec(pos_offset=0, max_pos=64),
    ),
    classifier(
        name="roberta-pad-3",
        hf=tiny(
            "RobertaConfig",
            "RobertaForSequenceClassification",
            PAD_2 | {"num_labels": 4},
        ),
        wrong=wrong_spec(pos_offset=2, max_pos=62),
    ),
    classifier(
        name="roberta-xlm",
        hf=tiny("XLMRobertaConfig", "XLMRobertaForSequenceClassification", ROBERTA | {"num_labels": 2}),
        wrong=wrong_spec(embed_norm=None),
    ),
    bare(
        name="roberta-bare",
        hf=tiny("RobertaConfig", "RobertaModel", ROBERTA),
        wrong=wrong_ffn(act="gelu_new"),
    ),
]
