"""Mamba."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.families import LAYERS, VOCAB, Case, causal, renamed, rewrite, wrong_norm

MAMBA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "state_size": 5,
    "num_hidden_layers": LAYERS,
    "time_step_rank": 7,
    "pad_token_id": 0,
}


def early(folder: Path) -> None:
    """The embedding under the name it had in the first files."""
    rewrite(folder, dict, lambda old: renamed(old, {"backbone.embeddings.": "backbone.embedding."}))


PADDING = "with a bias on the projection in, the class lets padding into the convolution"

CASES = [
    Case(name="mamba", hf=causal("Mamba", MAMBA), wrong=wrong_norm(eps=1e-3), gradients=True),
    Case(
        name="mamba-biased",
        hf=causal(
            "Mamba",
            MAMBA
            | {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "expand": 3}
            | {"tie_word_embeddings": False, "time_step_rank": "auto"},
        ),
        wrong=wrong_norm(eps=1e-3),
        left_pad=PADDING,
    ),
    Case(
        name="mamba-early",
        hf=causal("Mamba", MAMBA),
        disguise=early,
        reload="transformers 5 no longer reads the embedding under its first name",
        wrong=wrong_norm(eps=1e-3),
    ),
]
