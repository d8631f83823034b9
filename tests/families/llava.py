"""LLaVA: the text model of a tiny whole model, the vision tower written back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tests.families import LLAMA, Case, rewrite, tiny, wrong_rope

VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
CLIP = VISION | {"model_type": "clip_vision_model", "projection_dim": 16}


def whole(stem: str, text: dict[str, Any], vision: dict[str, Any], **more: Any) -> Any:
    """A builder of {stem}ForConditionalGeneration."""
    parts = {"text_config": text, "vision_config": vision, **more}
    return tiny(f"{stem}Config", f"{stem}ForConditionalGeneration", parts)


def as_in_memory(folder: Path) -> None:
    """The folder under the names that modules of newer transformers have."""
    swaps = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }

    def tensors(old: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            next(new + key.removeprefix(was) for was, new in swaps.items() if key.startswith(was)): tensor
            for key, tensor in old.items()
        }

    rewrite(folder, dict, tensors)


def as_released(tensors: Any) -> dict[str, Tensor]:
    """`as_in_memory` undone: what export gives."""
    head = {"lm_head.weight": "language_model.lm_head.weight"}
    plain = {head.get(key, key.removeprefix("model.")): tensor for key, tensor in tensors.items()}
    return {
        key.replace("language_model.", "language_model.model.", 1) if "lm_head" not in key else key: tensor
        for key, tensor in plain.items()
    }


CASES = [
    Case(
        name="llava",
        hf=whole("Llava", LLAMA | {"model_type": "llama"}, CLIP),
        wrong=wrong_rope(theta=2e4),
    ),
    Case(
        name="llava-mistral",
        hf=whole("Llava", LLAMA | {"model_type": "mistral", "sliding_window": 8}, CLIP),
        disguise=as_in_memory,
        written=as_released,
        wrong=wrong_rope(theta=2e4),
    ),
]
