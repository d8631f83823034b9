"""Persimmon (Adept 2023): squared ReLU, a layer norm on every query and key head, half of each head
rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model.families import gpt_neox, phi
from caravan.model.spec import Spec

ARCHITECTURE = "PersimmonForCausalLM"
CLASSIFIER = "PersimmonForSequenceClassification"
CHECKPOINTS = ("adept/persimmon-8b-base", "adept/persimmon-8b-chat")

RULES = """
table @=model.layers.{i} ~=model
prefix? model.
drop rotary_emb
~.{embed_tokens,final_layernorm} -> {embed,norm}; lm_head -> head
@.{input,post_attention}_layernorm -> {n1,n2}
@.self_attn.query_key_value -> mix.qkv : grp
@.self_attn.{dense,q_layernorm,k_layernorm} -> mix.{o,qn,kn}
@.mlp.dense_{h_to_4h,4h_to_h} -> ffn.{inp,out}
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    alone = {key: value for key, value in config.items() if key != "num_key_value_heads"}
    return phi.biased(alone, act="relu2", qk_norm=True, context=16384)


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = gpt_neox.equal_config(value)
    del result["num_key_value_heads"]
    return result
