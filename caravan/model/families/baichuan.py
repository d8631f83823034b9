"""Baichuan 1 and 2 (Yang et al. 2023, arXiv:2309.10305): Llama with q, k and v in one matrix. The 13B have
ALiBi instead of rotary positions; the second generation divides the rows of its head by their length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import llama
from caravan.model.spec import Spec

ARCHITECTURE = "BaichuanForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("baichuan-inc/Baichuan-7B", "baichuan-inc/Baichuan-13B-*", "baichuan-inc/Baichuan2-7B-*",
               "baichuan-inc/Baichuan2-13B-*")  # fmt: skip
RULES = """
table baichuan like llama
@.self_attn.W_pack -> mix.qkv
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Files with rotary positions say `max_position_embeddings`, those with ALiBi only
    `model_max_length`; the second generation alone has a `z_loss_weight`."""
    rotary = config.get("max_position_embeddings") is not None
    context = keys.size(config, "max_position_embeddings", "model_max_length")
    full = {**config, "max_position_embeddings": context, "num_key_value_heads": None, "head_dim": None}
    value = llama.spec({**full, "attention_bias": False, "mlp_bias": False})
    if not rotary:
        value = llama.with_attention(value, lambda i, attn: replace(attn, rope=None, alibi=True))
    return replace(value, head_norm="z_loss_weight" in config)


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = llama.config(value)
    for name in ("attention_bias", "mlp_bias", "head_dim", "num_key_value_heads"):
        del result[name]
    if value.layers[0].attn.alibi:
        result["model_max_length"] = result.pop("max_position_embeddings")
    return {**result, **({"z_loss_weight": 0.0} if value.head_norm else {})}
