"""InternLM 2 and 2.5 (Cai et al. 2024, arXiv:2403.17297): Llama with queries, keys and values of a group side
by side in one matrix, under names of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.families import llama
from caravan.model.spec import Spec

ARCHITECTURE = "InternLM2ForCausalLM"
CLASSIFIER = "InternLM2ForSequenceClassification"
CHECKPOINTS = ("internlm/internlm2-*", "internlm/internlm2_5-*")
RULES = """
table internlm2 like llama
~.tok_embeddings -> embed; output -> head; @.{attention,ffn}_norm -> {n1,n2}; - mix.qn; - mix.kn
@.attention.wqkv -> mix.qkv : grp; @.attention.wo -> mix.o
@.feed_forward.{w1,w3} -> ffn.inp : cat; @.feed_forward.w2 -> ffn.out
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec; `bias` is about q, k, v and o."""
    bias = keys.flag(config, "bias", default=False)
    return llama.spec({**config, "attention_bias": bias, "mlp_bias": False, "head_dim": None})


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = llama.config(value)
    del result["mlp_bias"], result["head_dim"]
    return {**result, "bias": result.pop("attention_bias")}
