"""Qwen2-VL and Qwen2.5-VL (Wang et al. 2024, arXiv:2409.12191): a Qwen 2 whose rotary frequencies are shared
out to time, height and width. In text the three are one position, so we open a plain Qwen 2 and keep the
vision tower.

Older files say of the text model what newer ones say in `text_config`; both are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from caravan.model import keys
from caravan.model.families import llama, llava, qwen2
from caravan.model.spec import Spec
from caravan.model.tensors import Renamed

ARCHITECTURE = "Qwen2VLForConditionalGeneration"
CLASSIFIER = None
CHECKPOINTS = ("Qwen/Qwen2-VL-*",)
RULES = llama.RULES
KEPT = r"^visual\."
ROPES = ("rope_scaling", "rope_parameters")
SHARES = "mrope_section"


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec of the text model. Raises UserError naming the key."""
    nested = config if config.get("text_config") else {**config, "text_config": config}
    said = llava.text(nested, {}, tie=False)
    for name in ROPES:
        values = keys.table(said, name)
        if values:
            said[name] = {k: "default" if v == "mrope" else v for k, v in values.items() if k != SHARES}
    return qwen2.spec(said)


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json, as far as it is about text."""
    return {**qwen2.config(value), **llava.nested(qwen2.config(value))}


def carried(old: Mapping[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The keys to be written, with what `text_config` had besides and how frequencies are shared."""
    said = {**old, **keys.table(old, "text_config")}
    shares = next((keys.table(said, n)[SHARES] for n in ROPES if SHARES in keys.table(said, n)), None)
    result = llava.carried(old, new)
    for part in (result, result["text_config"]) if shares else ():
        part["rope_parameters"] = {**part["rope_parameters"], SHARES: shares}
        part["rope_scaling"] = {"type": "mrope", SHARES: shares}
    return result


def opened(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a folder, named as releases are also where a program wrote the names in its memory."""
    if not any(key.startswith("model.language_model.") for key in tensors):
        return tensors
    swaps = {"model.language_model.": "model.", "model.visual.": "visual."}
    return Renamed(
        tensors, lambda key: next((key.replace(a, b, 1) for a, b in swaps.items() if key.startswith(a)), key)
    )
