"""Qwen2.5-VL: the text model of a tiny whole model, the vision tower written back."""

from __future__ import annotations

from tests.families import Case, wrong_rope
from tests.families.llava import whole
from tests.families.qwen2_vl import QWEN

VISION = {"depth": 1, "hidden_size": 16, "out_hidden_size": 48, "num_heads": 2, "intermediate_size": 24}

CASES = [Case(name="qwen2_5_vl", hf=whole("Qwen2_5_VL", QWEN, VISION), wrong=wrong_rope(theta=1e4))]
