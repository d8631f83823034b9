"""Mamba-2."""

from __future__ import annotations

from typing import Any

from tests.families import LAYERS, VOCAB, Case, causal, change
from tests.families.mamba import PADDING

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "state_size": 6,
    "num_hidden_layers": LAYERS,
    "num_heads": 6,
    "head_dim": 16,
    "n_groups": 2,
    "chunk_size": 8,
    "pad_token_id": 0,
}

CASES = [
    Case(
        name="mamba2",
        hf=causal("Mamba2", SMALL),
        wrong=lambda spec: change(spec, "ssm", eps=1e-3),
        gradients=True,
    ),
    Case(
        name="mamba2-limited",
        hf=causal(
            "Mamba2",
            SMALL | {"time_step_limit": [0.01, 0.05], "use_bias": True, "tie_word_embeddings": True},
        ),
        wrong=lambda spec: change(spec, "ssm", dt_limit=(0.0, float("inf"))),
        left_pad=PADDING,
    ),
]
