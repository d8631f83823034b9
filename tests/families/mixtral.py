"""Mixtral: every layer a mixture, weights of the chosen renormalised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.families import LLAMA, Case, causal, change


def wrong_moe(**values: Any) -> Callable[[Any], Any]:
    """A Spec -> Spec that sets values of every mixture."""

    def changed(spec: Any) -> Any:
        first = next(layer.ffn.moe for layer in spec.layers if layer.ffn.moe)
        layers = tuple(
            replace(layer, ffn=replace(layer.ffn, moe=replace(first, **values))) if layer.ffn.moe else layer
            for layer in spec.layers
        )
        return replace(spec, layers=layers)

    return changed


MIXTRAL = LLAMA | {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}

CASES = [
    Case(name="mixtral", hf=causal("Mixtral", MIXTRAL), wrong=wrong_moe(renorm=False)),
    Case(
        name="mixtral-window",
        hf=causal("Mixtral", MIXTRAL | {"sliding_window": 8, "head_dim": 12, "num_experts_per_tok": 3}),
        wrong=lambda spec: change(spec, "attn", window=9),
    ),
]
