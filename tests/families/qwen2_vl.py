"""Qwen2-VL: the text model of a tiny whole model, the vision tower written back; both ways of saying it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.families import LLAMA, Case, rewrite, wrong_attn, wrong_rope
from tests.families.llava import whole

SHARED = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
QWEN = LLAMA | {"rope_parameters": SHARED}
VISION = {"depth": 1, "embed_dim": 16, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2}


def flat(folder: Path) -> None:
    """config.json as the release says it: keys of the text model among those of the whole."""

    def config(old: dict[str, Any]) -> dict[str, Any]:
        text = old.pop("text_config")
        rope = text.pop("rope_parameters")
        gone = ("layer_types", "model_type", "pad_token_id", "bos_token_id", "eos_token_id")
        text = {key: value for key, value in text.items() if key not in gone}
        scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        return old | text | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}

    rewrite(folder, config)


CASES = [
    Case(name="qwen2_vl", hf=whole("Qwen2VL", QWEN, VISION), wrong=wrong_rope(theta=1e4)),
    Case(
        name="qwen2_vl-flat",
        hf=whole("Qwen2VL", QWEN, VISION, tie_word_embeddings=True),
        disguise=flat,
        wrong=wrong_attn(scale=0.3),
    ),
]
