"""CPM-Ant: prompt rows in front, a bias per bucket and pair of segments, everything seen both ways."""

from __future__ import annotations

from typing import Any

from caravan.model.checkpoint import load_backbone
from tests.families import VOCAB, Case, causal, wrong_ffn, wrong_spec
from tests.families.bert import rebuild

ANT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "dim_head": 10,
    "dim_ff": 88,
    "num_hidden_layers": 4,
    "prompt_types": 4,
    "prompt_length": 5,
    "segment_types": 3,
    "position_bias_num_buckets": 16,
    "position_bias_max_distance": 32,
}


def case(name: str, wrong: Any, **values: Any) -> Case:
    return Case(
        name=name,
        hf=causal("CpmAnt", ANT | values),
        wrong=wrong,
        load=load_backbone,
        rebuild=rebuild,
        left_pad="the class takes id 0 for padding and counts it from the wrong end",
        decode="a new token changes what earlier ones saw",
    )


CASES = [
    case("cpmant", wrong_ffn(act="gelu_new")),
    case("cpmant-one-prompt", wrong_spec(max_pos=64), prompt_length=1, prompt_types=3),
]
