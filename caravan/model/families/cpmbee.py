"""CPM-Bee (OpenBMB 2023), in the layout of its Hugging Face folders: model/encoders/cpm.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caravan.model import keys
from caravan.model.encoders.cpm import FLAT_EDGES, Bee, CpmSpec
from caravan.model.families import cpmant
from caravan.types import UserError

ARCHITECTURE = "CpmBeeForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("openbmb/cpm-bee-1b", "openbmb/cpm-bee-2b", "openbmb/cpm-bee-5b", "openbmb/cpm-bee-10b")
MODULE = Bee
TOKENS = {"<s>": "bos", "</s>": "eos", "<ans>": "answer"}

RULES = r"""
table @=cpmbee.encoder.layers.{i} ~=cpmbee
prefix? cpmbee.
drop rotary_emb\.inv_freq$
~.{input_embedding,encoder.output_layernorm} -> {embed,norm}; lm_head -> head
~.position_bias.relative_attention_bias -> rel
@.self_att.layernorm_before_attention -> n1; @.ffn.layernorm_before_ffn -> n2
@.self_att.self_attention.{project_q,project_k,project_v} -> mix.qkv : cat
@.self_att.self_attention.attention_out -> mix.o
@.ffn.ffn.w_in.{w_0,w_1} -> ffn.inp : cat; @.ffn.ffn.w_out -> ffn.out
"""


def beside(folder: Path) -> dict[str, Any]:
    """Ids of `<s>`, `</s>` and `<ans>`, which the release keeps in vocab.txt only. Raises UserError."""
    path = folder / "vocab.txt"
    if not path.is_file():
        return {}
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}", "download it again") from None
    return {f"{name}_token_id": lines.index(text) for text, name in TOKENS.items() if text in lines}


def spec(config: Mapping[str, Any]) -> CpmSpec:
    """config.json -> CpmSpec. Pruned checkpoints (`mask_modules`) are refused."""
    masks = config.get("mask_modules")
    if masks and not all(all(pair) for pair in masks):
        raise keys.unsupported("mask_modules", masks, ["null"])
    edges = keys.size(config, "position_bias_num_segment_buckets", default=32)
    common = cpmant.common(config)
    bos, answer = (keys.token(config, f"{name}_token_id", common["vocab"]) for name in ("bos", "answer"))
    if bos is not None and edges < FLAT_EDGES:
        raise keys.wrong("position_bias_num_segment_buckets", edges, f"at least {FLAT_EDGES}")
    return CpmSpec(
        **common,
        embed_scale=common["d"] ** -0.5,
        logit_scale=common["d"] ** -0.5,
        bos=bos,
        prefix_token=-1 if answer is None else answer,
        prefix_more=2,  # `<ans></s>`, the answer's key, is context too
        segments=edges,
        max_pos=keys.size(config, "position_bias_max_distance", default=2048),
        buckets=keys.size(config, "position_bias_num_buckets", default=256),
        distance_scale=keys.real(config, "distance_scale", default=16),
        tie=keys.flag(config, "tie_word_embeddings", default=True),
    )


def config(value: CpmSpec) -> dict[str, Any]:
    """CpmSpec -> config.json."""
    tokens = {"bos_token_id": value.bos, "answer_token_id": value.prefix_token}
    return {k: token for k, token in tokens.items() if token is not None and token >= 0} | {
        **cpmant.common_config(value),
        "position_bias_num_segment_buckets": value.segments,
        "distance_scale": value.distance_scale,
        "tie_word_embeddings": value.tie,
    }
