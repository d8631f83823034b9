"""StableLM 3B, 2-1.6B and 2-12B."""

from __future__ import annotations

from tests.families import LLAMA, Case, causal, wrong_layer, wrong_norm, wrong_rope
from tests.families.gpt_neox import turned

SMALL = LLAMA | {"hidden_size": 96} | turned(0.25)
FULL = {"num_key_value_heads": 6}
SIDE_BY_SIDE = {"qk_layernorm": True, "use_parallel_residual": True}

CASES = [
    Case(name="stablelm-3b", hf=causal("StableLm", SMALL | FULL), wrong=wrong_norm(kind="rms")),
    Case(
        name="stablelm-1.6b",
        hf=causal("StableLm", SMALL | FULL | {"use_qkv_bias": True}),
        wrong=wrong_rope(dim=16),
    ),
    Case(
        name="stablelm-12b",
        hf=causal("StableLm", SMALL | SIDE_BY_SIDE),
        wrong=wrong_layer(beta=0.99),
        gradients=True,
    ),
    Case(
        name="stablelm-normed-in-turn",
        hf=causal("StableLm", SMALL | {"qk_layernorm": True, "layer_norm_eps": 1e-3}),
        wrong=wrong_rope(theta=9e3),
    ),
]
