"""OLMo 2."""

from __future__ import annotations

from tests.families import LLAMA, Case, causal, wrong_layer

CASES = [Case(name="olmo2", hf=causal("Olmo2", LLAMA), wrong=wrong_layer(post="sum"), gradients=True)]
