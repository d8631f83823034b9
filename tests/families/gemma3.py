"""Gemma 3 with its vision tower: the text model of a tiny whole model, the tower written back."""

from __future__ import annotations

from tests.families import Case, wrong_attn, wrong_rope
from tests.families.gemma3_text import GEMMA3, STRETCHED
from tests.families.llava import VISION, as_in_memory, as_released, whole

CASES = [
    Case(
        name="gemma3-vision",
        hf=whole("Gemma3", GEMMA3 | STRETCHED, VISION, mm_tokens_per_image=4),
        wrong=wrong_rope(theta=1e4),
    ),
    Case(
        name="gemma3-vision-renamed",
        hf=whole("Gemma3", GEMMA3, VISION, mm_tokens_per_image=4),
        disguise=as_in_memory,
        written=as_released,
        wrong=wrong_attn(scale=12**-0.5),
    ),
]
