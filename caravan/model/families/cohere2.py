"""Command R7B and A (Cohere 2024): Command R with windowed rotary layers and global ones without position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model.families import cohere, llama
from caravan.model.spec import Spec

ARCHITECTURE = "Cohere2ForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("CohereForAI/c4ai-command-r7b-12-2024", "CohereForAI/c4ai-command-a-03-2025")
RULES = cohere.RULES


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec; without `layer_types` every `sliding_window_pattern`-th layer is global."""
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 4
    value = cohere.spec({**config, "use_qk_norm": False})
    size = llama.window(config, 4096)
    slides = llama.layer_kinds(config, len(value.layers), lambda i: (i + 1) % pattern != 0)
    return llama.with_attention(
        value,
        lambda i, attn: replace(
            attn, window=size if slides[i] else None, rope=attn.rope if slides[i] else None
        ),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = cohere.config(value)
    del result["use_qk_norm"]
    kinds = ["sliding_attention" if attn.rope else "full_attention" for attn in value.attns]
    size = next((attn.window for attn in value.attns if attn.window), None)
    return {**result, "layer_types": kinds, **({"sliding_window": size} if size else {})}
