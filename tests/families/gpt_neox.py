"""GPT-NeoX and its line: Pythia, RedPajama, StableLM-alpha, Dolly v2."""

from __future__ import annotations

from typing import Any

from tests.families import LAYERS, VOCAB, Case, causal, wrong_ffn, wrong_layer, wrong_norm, wrong_rope

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "intermediate_size": 100,
    "max_position_embeddings": 64,
}


def turned(share: float, **more: Any) -> dict[str, Any]:
    """Keys of a rotation of a share of each head."""
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": share,
            **more,
        }
    }


CASES = [
    # Pythia, Dolly v2, GPT-NeoX-20B
    Case(name="gpt_neox", hf=causal("GPTNeoX", SMALL | turned(0.25)), wrong=wrong_ffn(act="gelu_new")),
    # RedPajama-INCITE: whole heads, one sublayer after the other
    Case(
        name="gpt_neox-redpajama",
        hf=causal("GPTNeoX", SMALL | turned(1.0) | {"use_parallel_residual": False}),
        wrong=wrong_layer(parallel=True),
    ),
    Case(
        name="gpt_neox-unbiased",
        hf=causal("GPTNeoX", SMALL | turned(0.5, rope_theta=25_000.0) | {"attention_bias": False}),
        wrong=wrong_rope(theta=10_000.0),
    ),
    Case(
        name="gpt_neox-stretched",
        hf=causal("GPTNeoX", SMALL | turned(0.25, rope_type="linear", factor=4.0)),
        wrong=wrong_rope(scaling=None),
    ),
    Case(
        name="gpt_neox-tied",
        hf=causal(
            "GPTNeoX", SMALL | {"tie_word_embeddings": True, "layer_norm_eps": 1e-3, "hidden_act": "silu"}
        ),
        wrong=wrong_norm(eps=1e-5),
        gradients=True,
    ),
]
