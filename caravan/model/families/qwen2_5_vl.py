"""Qwen2.5-VL (Bai et al. 2025, arXiv:2502.13923): to text what Qwen2-VL is; the vision tower, which is kept,
is another."""

from __future__ import annotations

from caravan.model.families import qwen2_vl

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
CLASSIFIER = None
CHECKPOINTS = ("Qwen/Qwen2.5-VL-*",)
RULES, KEPT = qwen2_vl.RULES, qwen2_vl.KEPT
spec, config, opened, carried = qwen2_vl.spec, qwen2_vl.config, qwen2_vl.opened, qwen2_vl.carried
