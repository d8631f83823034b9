"""CPM-Bee (OpenBMB 2023), in the layout of its Hugging Face folders: model/encoders/cpm.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.encoders.cpm import Bee, CpmSpec
from caravan.model.families import cpmant

ARCHITECTURE = "CpmBeeForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("openbmb/cpm-bee-1b", "openbmb/cpm-bee-2b", "openbmb/cpm-bee-5b", "openbmb/cpm-bee-10b")
MODULE = Bee

RULES = r"""
table @=cpmbee.encoder.layers.{i} ~=cpmbee
prefix? cpmbee.
drop rotary_emb\.inv_freq$
~.{input_embedding,encoder.output_layernorm} -> {embed,norm}; lm_head -> head
~.position_bias.relative_attention_bias -> rel
@.self_att.layernorm_before_attention -> n1; @.ffn.layernorm_before_ffn -> n2
@.self_att.self_attention.{project_q,project_k,project_v} -> a.proj : cat
@.self_att.self_attention.attention_out -> a.o
@.ffn.ffn.w_in.{w_0,w_1} -> ffn.inp : cat; @.ffn.ffn.w_out -> ffn.out
"""


def spec(config: Mapping[str, Any]) -> CpmSpec:
    """config.json -> CpmSpec. Pruned checkpoints (`mask_modules`) are refused."""
    masks = config.get("mask_modules")
    if masks and not all(all(pair) for pair in masks):
        raise keys.unsupported("mask_modules", masks, ["null"])
    return CpmSpec(
        **cpmant.common(config),
        max_pos=keys.size(config, "position_bias_max_distance", default=2048),
        buckets=keys.size(config, "position_bias_num_buckets", default=256),
        segments=keys.size(config, "position_bias_num_segment_buckets", default=32),
        distance_scale=keys.real(config, "distance_scale", default=16),
        tie=keys.flag(config, "tie_word_embeddings", default=True),
    )


def config(value: CpmSpec) -> dict[str, Any]:
    """CpmSpec -> config.json."""
    return cpmant.common_config(value) | {
        "position_bias_num_segment_buckets": value.segments,
        "distance_scale": value.distance_scale,
        "tie_word_embeddings": value.tie,
    }
