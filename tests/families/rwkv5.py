"""RWKV-5, held against the published equations worked one token and one head at a time in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.families import LAYERS, VOCAB, Case, change, drawn

D, HEADS, WIDTH, INNER, FF = 48, 3, 8, 24, 64

CONFIG: dict[str, Any] = {
    "model_type": "rwkv5",
    "vocab_size": VOCAB,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "attention_hidden_size": INNER,
    "head_size": WIDTH,
    "head_size_divisor": 8,
    "intermediate_size": FF,
    "layer_norm_epsilon": 1e-4,
    "tie_word_embeddings": False,
}

PORT = {
    "emb.": "rwkv.embeddings.", "ln_out.": "rwkv.ln_out.", ".ln0.": ".pre_ln.", "blocks.": "rwkv.blocks.",
    ".att.": ".attention.", ".ffn.": ".feed_forward.",
    ".time_mix_k": ".time_mix_key", ".time_mix_v": ".time_mix_value", ".time_mix_r": ".time_mix_receptance",
    ".time_mix_g": ".time_mix_gate",
}  # fmt: skip
"""The author's names -> those of the port to transformers."""


def ported(name: str) -> str:
    for old, new in PORT.items():
        name = name.replace(old, new)
    return name


def norms(*names: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{end}": (D,) for name in names for end in ("weight", "bias")}


def shapes() -> dict[str, tuple[int, ...]]:
    result = {"emb.weight": (VOCAB, D), "head.weight": (VOCAB, D), **norms("ln_out", "blocks.0.ln0")}
    for i in range(LAYERS):
        a, f = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        result |= norms(f"blocks.{i}.ln1", f"blocks.{i}.ln2")
        result |= {a + "time_decay": (HEADS, WIDTH), a + "time_faaaa": (HEADS, WIDTH)}
        result |= {a + f"time_mix_{c}": (1, 1, D) for c in "kvrg"}
        result |= {a + f"{m}.weight": (INNER, D) for m in ("receptance", "key", "value", "gate")}
        result |= {a + "output.weight": (D, INNER), a + "ln_x.weight": (INNER,), a + "ln_x.bias": (INNER,)}
        result |= {f + f"time_mix_{c}": (1, 1, D) for c in "kr"}
        result |= {f + "key.weight": (FF, D), f + "receptance.weight": (D, D), f + "value.weight": (D, FF)}
    return result


def tensors() -> dict[str, Tensor]:
    return drawn(shapes())


def port_tensors() -> dict[str, Tensor]:
    return {ported(name): t for name, t in tensors().items()}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + bias


class Weights:
    """File tensors as float64 arrays without axes of length 1."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __call__(self, name: str) -> np.ndarray:
        return self.tensors[name].double().squeeze().numpy()

    def norm(self, name: str, x: np.ndarray, eps: float) -> np.ndarray:
        return layer_norm(x, self(f"{name}.weight"), self(f"{name}.bias"), eps)


def time_mix(get: Weights, at: str, x: np.ndarray, old: np.ndarray, states: list[np.ndarray]) -> np.ndarray:
    def shifted(letter: str) -> np.ndarray:
        share = get(f"{at}.time_mix_{letter}")
        return share * x + (1 - share) * old

    r, k, v = (
        get(f"{at}.{name}.weight") @ shifted(letter)
        for name, letter in (("receptance", "r"), ("key", "k"), ("value", "v"))
    )
    gate = get(f"{at}.gate.weight") @ shifted("g")
    decay, bonus = np.exp(-np.exp(get(f"{at}.time_decay"))), get(f"{at}.time_faaaa")
    weight, bias = get(f"{at}.ln_x.weight"), get(f"{at}.ln_x.bias")
    y = np.empty(INNER)
    for h in range(HEADS):
        mine = slice(h * WIDTH, (h + 1) * WIDTH)
        now = np.outer(k[mine], v[mine])
        out = r[mine] @ (states[h] + np.diag(bonus[h]) @ now)
        states[h] = np.diag(decay[h]) @ states[h] + now
        y[mine] = layer_norm(out / 8, weight[mine], bias[mine], 1e-5)
    return get(f"{at}.output.weight") @ (y * gate * sigmoid(gate))


def channel_mix(get: Weights, at: str, x: np.ndarray, old: np.ndarray) -> np.ndarray:
    share_k, share_r = get(f"{at}.time_mix_k"), get(f"{at}.time_mix_r")
    k = np.maximum(get(f"{at}.key.weight") @ (share_k * x + (1 - share_k) * old), 0) ** 2
    r = sigmoid(get(f"{at}.receptance.weight") @ (share_r * x + (1 - share_r) * old))
    return r * (get(f"{at}.value.weight") @ k)


def oracle(config: Mapping[str, Any], tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    names = {ported(name): name for name in shapes()}
    get, eps = Weights({names.get(name, name): t for name, t in tensors.items()}), 1e-4
    rows = []
    for row in ids.tolist():
        old_att, old_ffn = ([np.zeros(D) for _ in range(LAYERS)] for _ in range(2))
        states = [[np.zeros((WIDTH, WIDTH)) for _ in range(HEADS)] for _ in range(LAYERS)]
        for token in row:
            x = get.norm("blocks.0.ln0", get("emb.weight")[token], eps)
            for i in range(LAYERS):
                h = get.norm(f"blocks.{i}.ln1", x, eps)
                x = x + time_mix(get, f"blocks.{i}.att", h, old_att[i], states[i])
                old_att[i] = h
                h = get.norm(f"blocks.{i}.ln2", x, eps)
                x = x + channel_mix(get, f"blocks.{i}.ffn", h, old_ffn[i])
                old_ffn[i] = h
            rows.append(get("head.weight") @ get.norm("ln_out", x, 1e-5))
    return torch.from_numpy(np.stack(rows)).float().view(*ids.shape, -1)


def wrong(spec: Any) -> Any:
    return change(spec, "ssm", eps=1e-5)


CASES = [
    Case(name="rwkv-5", oracle=oracle, config=CONFIG, tensors=tensors, wrong=wrong),
    Case(
        name="rwkv-5-port",
        oracle=oracle,
        config=CONFIG | {"architectures": ["Rwkv5ForCausalLM"]},
        tensors=port_tensors,
        wrong=wrong,
    ),
]
