"""GLM-4-0414."""

from __future__ import annotations

from tests.families import Case, causal, wrong_layer
from tests.families.glm import GLM

CASES = [Case(name="glm4", hf=causal("Glm4", GLM), wrong=wrong_layer(post="sum"))]
