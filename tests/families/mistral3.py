"""Mistral Small 3.1: the text model of a tiny whole model, the vision tower written back."""

from __future__ import annotations

from tests.families import LLAMA, Case, wrong_rope
from tests.families.llava import VISION, whole

MISTRAL = LLAMA | {"model_type": "mistral", "head_dim": 12, "sliding_window": None}
PIXTRAL = VISION | {"model_type": "pixtral", "head_dim": 8}

CASES = [
    Case(
        name="mistral3",
        hf=whole("Mistral3", MISTRAL, PIXTRAL, tie_word_embeddings=False),
        wrong=wrong_rope(theta=2e4),
    ),
    Case(
        name="mistral3-tied",
        hf=whole("Mistral3", MISTRAL, PIXTRAL, tie_word_embeddings=True),
        wrong=wrong_rope(theta=2e4),
    ),
]
