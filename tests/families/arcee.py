"""AFM."""

from __future__ import annotations

from tests.families import LLAMA, Case, causal, wrong_ffn

CASES = [Case(name="arcee", hf=causal("Arcee", LLAMA | {"mlp_bias": True}), wrong=wrong_ffn(act="relu"))]
