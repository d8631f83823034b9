"""LLaVA 1.5 (Liu et al. 2023, arXiv:2310.03744): a Llama or Mistral with a vision tower before it.

We open the text model, which `text_config` describes; the tower and the projector are kept as they are and
written back with it. The readers here serve every family that is nested like this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from caravan.model import keys
from caravan.model.families import llama, mistral
from caravan.model.spec import Spec
from caravan.model.tensors import Renamed
from caravan.types import UserError

ARCHITECTURE = "LlavaForConditionalGeneration"
CLASSIFIER = None
CHECKPOINTS = ("llava-hf/llava-1.5-*", "llava-hf/bakLlava-v1-hf")

RULES = """
table llava like llama @=language_model.model.layers.{i} ~=language_model.model
prefix? language_model.
language_model.lm_head -> head
"""
KEPT = r"^(vision_tower|multi_modal_projector)\."

COMMON = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32_000}
TEXTS = {
    "llama": (llama.spec, COMMON | {"intermediate_size": 11_008}),
    "mistral": (mistral.spec, COMMON | {"intermediate_size": 14_336}),
}
"""By model_type: the reader, and what its class of transformers assumes; files leave that out."""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec of the text model. Raises UserError naming the key."""
    reader, assumed = keys.word(inner(config), "model_type", known=TEXTS, default="llama")
    value: Spec = reader(text(config, assumed, tie=False))
    return value


def inner(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`text_config`. Raises UserError without one."""
    if not keys.table(config, "text_config"):
        raise UserError("config.json has no 'text_config'", "it describes the text part of such a model")
    return keys.table(config, "text_config")


def text(config: Mapping[str, Any], assumed: Mapping[str, Any], tie: bool) -> dict[str, Any]:
    """The keys of the text model, over what is assumed. A tied head: what the whole model says, else they."""
    said = {k: value for k, value in inner(config).items() if value is not None or k == "sliding_window"}
    own = keys.flag(said, "tie_word_embeddings", default=tie)
    return {**assumed, **said, "tie_word_embeddings": keys.flag(config, "tie_word_embeddings", default=own)}


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json, as far as it is about text."""
    window = value.layers[0].attn.window
    return nested({**llama.config(value), "sliding_window": window})


def nested(said: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a text model where the whole model has them."""
    return {"text_config": dict(said), "tie_word_embeddings": said["tie_word_embeddings"]}


def carried(old: Mapping[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The keys to be written, with what `text_config` had besides."""
    return {**new, "text_config": {**keys.table(old, "text_config"), **new["text_config"]}}


def opened(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a folder, named as releases are also where a program wrote the names in its memory."""
    if not any(key.startswith("model.language_model.") for key in tensors):
        return tensors
    return Renamed(tensors, _released)


def _released(key: str) -> str:
    if key.startswith("lm_head."):
        return f"language_model.{key}"
    rest = key.removeprefix("model.language_model.")
    return f"language_model.model.{rest}" if rest != key else key.removeprefix("model.")
