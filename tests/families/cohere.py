"""Command R and R+."""

from __future__ import annotations

from tests.families import LLAMA, Case, causal, wrong_rope, wrong_spec

CASES = [
    Case(name="cohere", hf=causal("Cohere", LLAMA), wrong=wrong_spec(logit_scale=0.07)),
    Case(
        name="cohere-qknorm",
        hf=causal(
            "Cohere", LLAMA | {"logit_scale": 0.8333, "use_qk_norm": True, "tie_word_embeddings": False}
        ),
        wrong=wrong_rope(theta=2e4),
    ),
]
