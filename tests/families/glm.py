"""GLM-4-9B."""

from __future__ import annotations

from tests.families import LLAMA, Case, causal, wrong_rope

GLM = LLAMA | {"head_dim": 12, "eos_token_id": 1}

CASES = [Case(name="glm", hf=causal("Glm", GLM), wrong=wrong_rope(dim=4))]
