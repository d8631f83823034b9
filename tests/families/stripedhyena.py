"""StripedHyena, held against a direct sum over the past in numpy (no FFT, no recurrence)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.families import LAYERS, VOCAB, Case, change, drawn
from tests.families.rwkv5 import Weights, sigmoid

D, HEADS, GROUPS, TAPS, MODES, FF = 48, 6, 3, 3, 2, 88
WIDTH = D // HEADS

CONFIG: dict[str, Any] = {
    "model_type": "stripedhyena",
    "vocab_size": VOCAB,
    "hidden_size": D,
    "num_filters": D,
    "num_layers": LAYERS,
    "attn_layer_idxs": [1, 3],
    "hyena_layer_idxs": [0, 2, 4],
    "num_attention_heads": HEADS,
    "proj_groups": GROUPS,
    "qkv_proj_bias": False,
    "mha_out_proj_bias": False,
    "rotary_emb_base": 5000,
    "state_size": MODES,
    "short_filter_length": TAPS,
    "short_filter_bias": True,
    "column_split_hyena": True,
    "inner_mlp_size": FF,
    "eps": 1e-5,
    "max_seqlen": 64,
    "tie_embeddings": False,
    "final_norm": True,
}


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    keyed = D // config["proj_groups"]
    result: dict[str, tuple[int, ...]] = {
        "backbone.embedding_layer.weight": (VOCAB, D),
        "backbone.unembed.weight": (VOCAB, D),
        "backbone.norm.scale": (D,),
    }
    for i in range(LAYERS):
        b = f"backbone.blocks.{i}."
        result |= {b + "pre_norm.scale": (D,), b + "post_norm.scale": (D,)}
        result |= {b + "mlp.l1.weight": (FF, D), b + "mlp.l2.weight": (FF, D), b + "mlp.l3.weight": (D, FF)}
        if i in config["attn_layer_idxs"]:
            result |= {b + "inner_mha_cls.Wqkv.weight": (D + 2 * keyed, D)}
            result |= {b + "inner_mha_cls.out_proj.weight": (D, D)}
            continue
        result |= {b + "projections.weight": (3 * D, D), b + "projections.bias": (3 * D,)}
        result |= {b + "out_filter_dense.weight": (D, D), b + "out_filter_dense.bias": (D,)}
        result |= {
            b + "filter.short_filter_weight": (3 * D, 1, TAPS),
            b + "filter.short_filter_bias": (3 * D,),
        }
        result |= {b + "filter.D": (D,), b + "filter.poles": (D, MODES, 1, 2)}
        result |= {b + "filter.residues": (D, MODES, 1, 2)}
    return result


def tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Poles inside the unit circle, and the buffer that the class saves besides."""
    result = drawn(shapes(config))
    for name, t in result.items():
        if name.endswith("poles"):
            size = t.norm(dim=-1, keepdim=True)
            result[name] = t / size * (0.3 + 0.65 * torch.tanh(size))
    return result | {"backbone.blocks.1.inner_mha_cls.rotary_emb.inv_freq": torch.ones(WIDTH // 2)}


def rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def hyena(get: Weights, at: str, x: np.ndarray, apart: bool) -> np.ndarray:
    z = x @ get(f"{at}.projections.weight").T + get(f"{at}.projections.bias")
    taps = get(f"{at}.filter.short_filter_weight")
    u = np.zeros_like(z)
    for t in range(len(z)):
        for k in range(TAPS):
            if t - k >= 0:
                u[t] += taps[:, TAPS - 1 - k] * z[t - k]
        u[t] += get(f"{at}.filter.short_filter_bias")
    order = (3, HEADS, WIDTH) if apart else (HEADS, 3, WIDTH)
    u = u.reshape(len(z), *order)
    gate, key, value = (u[:, n] if apart else u[:, :, n] for n in range(3))
    gate, inner = gate.reshape(-1, D), (key * value).reshape(-1, D)
    poles, residues = (get(f"{at}.filter.{name}") @ np.array([1, 1j]) for name in ("poles", "residues"))
    y = np.zeros_like(inner)
    for t in range(len(x)):
        for s in range(t + 1):
            y[t] += (residues * poles ** (t - s)).sum(-1).real * inner[s]
    y = gate * (y + get(f"{at}.filter.D") * inner)
    return y @ get(f"{at}.out_filter_dense.weight").T + get(f"{at}.out_filter_dense.bias")


def attention(get: Weights, at: str, x: np.ndarray, groups: int) -> np.ndarray:
    qkv = (x @ get(f"{at}.inner_mha_cls.Wqkv.weight").T).reshape(len(x), -1, WIDTH)
    keyed = HEADS // groups
    half = WIDTH // 2
    angle = np.arange(len(x))[:, None] * 5000.0 ** (-np.arange(half) / half)
    rotated = qkv.copy()
    for h in range(HEADS + keyed):
        a, b = qkv[:, h, :half], qkv[:, h, half:]
        rotated[:, h, :half] = a * np.cos(angle) - b * np.sin(angle)
        rotated[:, h, half:] = b * np.cos(angle) + a * np.sin(angle)
    y = np.zeros((len(x), HEADS, WIDTH))
    for h in range(HEADS):
        k, v = rotated[:, HEADS + h // groups], qkv[:, HEADS + keyed + h // groups]
        for t in range(len(x)):
            score = k[: t + 1] @ rotated[t, h] / np.sqrt(WIDTH)
            weight = np.exp(score - score.max())
            y[t, h] = weight / weight.sum() @ v[: t + 1]
    return y.reshape(len(x), D) @ get(f"{at}.inner_mha_cls.out_proj.weight").T


def oracle(config: Mapping[str, Any], tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    get, rows = Weights(tensors), []
    for row in ids.tolist():
        x = get("backbone.embedding_layer.weight")[row]
        for i in range(LAYERS):
            b = f"backbone.blocks.{i}"
            h = rms(x, get(f"{b}.pre_norm.scale"))
            if i in config["attn_layer_idxs"]:
                x = x + attention(get, b, h, config["proj_groups"])
            else:
                x = x + hyena(get, b, h, not config["column_split_hyena"])
            h = rms(x, get(f"{b}.post_norm.scale"))
            gate = h @ get(f"{b}.mlp.l1.weight").T
            up = h @ get(f"{b}.mlp.l2.weight").T
            x = x + (gate * sigmoid(gate) * up) @ get(f"{b}.mlp.l3.weight").T
        rows.append(rms(x, get("backbone.norm.scale")) @ get("backbone.unembed.weight").T)
    return torch.from_numpy(np.stack(rows)).float()


APART = CONFIG | {"column_split_hyena": False, "proj_groups": 1}

CASES = [
    Case(
        name="stripedhyena",
        oracle=oracle,
        config=CONFIG,
        tensors=lambda: tensors(CONFIG),
        wrong=lambda spec: change(spec, "ssm", column_split=False),
    ),
    Case(
        name="stripedhyena-apart",
        oracle=oracle,
        config=APART,
        tensors=lambda: tensors(APART),
        wrong=lambda spec: change(spec, "ssm", column_split=True),
    ),
]
