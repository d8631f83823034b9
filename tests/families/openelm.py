"""OpenELM, whose layers differ in heads and width, against an oracle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.families import VOCAB, Case, drawn, wrong_attn, wrong_norm

E, D = 12, 48
HEADS, GROUPS, RATIOS = [3, 6, 6, 9], [1, 2, 2, 3], [0.5, 1.0, 1.6, 2.4]
WIDTHS = [
    24,
    48,
    80,
    112,
]  # the ratios times 48, to the nearest multiple of 8; 115.2 is nearer to 112 than 120
CONFIG: dict[str, Any] = {
    "model_type": "openelm",
    "model_dim": D,
    "head_dim": E,
    "num_transformer_layers": 4,
    "num_query_heads": HEADS,
    "num_kv_heads": GROUPS,
    "ffn_multipliers": RATIOS,
    "ffn_dim_divisor": 8,
    "ffn_with_glu": True,
    "activation_fn_name": "swish",
    "normalization_layer_name": "rms_norm",
    "normalize_qk_projections": True,
    "rope_freq_constant": 10000,
    "rope_max_length": 128,
    "max_context_length": 64,
    "share_input_output_layers": True,
    "vocab_size": VOCAB,
}


def weights() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.token_embeddings.weight": (VOCAB, D),
        "transformer.norm.weight": (D,),
    }
    for i, (h, k, f) in enumerate(zip(HEADS, GROUPS, WIDTHS, strict=True)):
        at = f"transformer.layers.{i}."
        shapes |= {
            at + "attn_norm.weight": (D,),
            at + "ffn_norm.weight": (D,),
            at + "attn.qkv_proj.weight": ((h + 2 * k) * E, D),
            at + "attn.q_norm.weight": (E,),
            at + "attn.k_norm.weight": (E,),
            at + "attn.out_proj.weight": (D, h * E),
            at + "ffn.proj_1.weight": (2 * f, D),
            at + "ffn.proj_2.weight": (D, f),
        }
    return drawn(shapes)


def oracle(config: Mapping[str, Any], w: Mapping[str, Tensor], ids_BT: Tensor) -> Tensor:
    """Whole rows at once, heads one by one, rotation by complex numbers."""

    def rms(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w[name + ".weight"]

    length = ids_BT.shape[1]
    frequency = 10000.0 ** (-torch.arange(0, E, 2) / E)
    turn = torch.polar(torch.ones(1), torch.arange(length)[:, None] * frequency)

    def rotated(x: Tensor) -> Tensor:
        z = torch.complex(x[..., : E // 2], x[..., E // 2 :]) * turn
        return torch.cat([z.real, z.imag], -1)

    x = w["transformer.token_embeddings.weight"][ids_BT]
    future = torch.full((length, length), -torch.inf).triu(1)
    for i in range(config["num_transformer_layers"]):
        at = f"transformer.layers.{i}."
        heads, groups = config["num_query_heads"][i], config["num_kv_heads"][i]
        parts = (rms(x, at + "attn_norm") @ w[at + "attn.qkv_proj.weight"].T).split(E, -1)
        out = []
        for h in range(heads):
            g = h * groups // heads
            q = rotated(rms(parts[h], at + "attn.q_norm"))
            k = rotated(rms(parts[heads + g], at + "attn.k_norm"))
            p = (q @ k.mT / E**0.5 + future).softmax(-1)
            out.append(p @ parts[heads + groups + g])
        x = x + torch.cat(out, -1) @ w[at + "attn.out_proj.weight"].T
        gate, up = (rms(x, at + "ffn_norm") @ w[at + "ffn.proj_1.weight"].T).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ w[at + "ffn.proj_2.weight"].T
    return rms(x, "transformer.norm") @ w["transformer.token_embeddings.weight"].T


CASES = [
    Case(
        name="openelm",
        oracle=oracle,
        config=CONFIG,
        tensors=weights,
        wrong=wrong_attn(scale=0.3),
    ),
    Case(
        name="openelm-own-head",
        oracle=lambda config, w, ids: oracle(config, w, ids) @ torch.linalg.pinv(
            w["transformer.token_embeddings.weight"].T) @ w["lm_head.weight"].T,
        config=CONFIG | {"share_input_output_layers": False},
        tensors=lambda: weights() | drawn({"lm_head.weight": (VOCAB, D)}, seed=5),
        wrong=wrong_norm(eps=1e-3),
    ),
]  # fmt: skip
