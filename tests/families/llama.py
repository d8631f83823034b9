"""Llama 1 to 3 and its stretched rotary embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.families import LLAMA, Case, causal, rewrite, wrong_attn, wrong_ffn, wrong_norm, wrong_rope


def rope(kind: str, theta: float = 1e4, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


LLAMA3 = rope("llama3", 5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)  # fmt: skip
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
MSCALE = {"rope_parameters": YARN["rope_parameters"] | {"mscale": 0.7, "mscale_all_dim": 1.0}}


def aquila(folder: Path) -> None:
    """The folder as Aquila's are: Llama under a name that transformers does not know."""
    rewrite(folder, lambda old: old | {"model_type": "aquila", "architectures": ["AquilaForCausalLM"]})


CASES = [
    Case(name="llama", hf=causal("Llama", LLAMA), wrong=wrong_norm(eps=1e-4), gradients=True),
    Case(
        name="llama-tied-mqa",
        hf=causal("Llama", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 12}),
        wrong=wrong_ffn(act="gelu"),
    ),
    Case(
        name="llama-bias",
        hf=causal("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
        wrong=wrong_attn(scale=1.0),
    ),
    Case(name="llama-aquila", hf=causal("Llama", LLAMA), disguise=aquila, wrong=wrong_rope(theta=2e4)),
    Case(name="llama3", hf=causal("Llama", LLAMA | LLAMA3), wrong=wrong_rope(scaling=None)),
    Case(
        name="llama-linear",
        hf=causal("Llama", LLAMA | rope("linear", factor=4.0)),
        wrong=wrong_rope(scaling=None),
    ),
    Case(
        name="llama-dynamic",
        hf=causal("Llama", LLAMA | {"max_position_embeddings": 16} | rope("dynamic", factor=2.0)),
        wrong=wrong_rope(scaling=None),
        decode="frequencies depend on the length of the text, so cached keys do, by design",
        left_pad="transformers takes the longest row's frequencies for all rows",
        packing="transformers takes the longest row's frequencies for all rows",
    ),
    Case(name="llama-yarn", hf=causal("Llama", LLAMA | YARN), wrong=wrong_rope(scaling=None)),
    Case(
        name="llama-yarn-short",  # where the ramp ends before it begins
        hf=causal(
            "Llama",
            LLAMA
            | rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=8,
                beta_fast=16.0,
                beta_slow=2.0,
                truncate=False,
            ),
        ),
        wrong=wrong_rope(scaling=None),
    ),
    Case(name="llama-yarn-mscale", hf=causal("Llama", LLAMA | MSCALE), wrong=wrong_rope(scaling=None)),
]
