"""CodeGen (Nijkamp et al. 2022, arXiv:2203.13474): GPT-J with one query-value-key matrix in four shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.families import gptj
from caravan.model.spec import Spec

ARCHITECTURE = "CodeGenForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("Salesforce/codegen-350M-mono", "Salesforce/codegen-16B-multi")
SHARDS = 4
"""The TPU cores of the first training run; the rows of qkv_proj keep their order ever since."""

RULES = """
table codegen like gptj
@.attn.qkv_proj -> mix.qkv : mp4qvk rope
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    value = gptj.spec(config)
    heads = value.layers[0].attn.n_head
    if heads % SHARDS:
        raise keys.wrong("n_head", heads, f"a multiple of {SHARDS}")
    return value


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    return {**gptj.config(value), "n_ctx": value.max_pos}
