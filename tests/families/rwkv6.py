"""RWKV-6, held against the published equations worked one token and one head at a time in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.families import LAYERS, VOCAB, Case, change, drawn
from tests.families.rwkv5 import CONFIG as FIVE
from tests.families.rwkv5 import FF, HEADS, INNER, WIDTH, D, Weights, layer_norm, norms, sigmoid

MIX, DECAY = 5, 7

CONFIG: dict[str, Any] = FIVE | {
    "model_type": "rwkv6",
    "time_mix_extra_dim": MIX,
    "time_decay_extra_dim": DECAY,
}

PORT = {
    "emb.": "rwkv.embeddings.", "ln_out.": "rwkv.ln_out.", ".ln0.": ".pre_ln.", "blocks.": "rwkv.blocks.",
    ".att.": ".attention.", ".ffn.": ".feed_forward.",
}  # fmt: skip
"""The author's names -> those of the port to transformers."""


def ported(name: str) -> str:
    for old, new in PORT.items():
        name = name.replace(old, new)
    return name


def shapes() -> dict[str, tuple[int, ...]]:
    result = {"emb.weight": (VOCAB, D), "head.weight": (VOCAB, D), **norms("ln_out", "blocks.0.ln0")}
    for i in range(LAYERS):
        a, f = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        result |= norms(f"blocks.{i}.ln1", f"blocks.{i}.ln2")
        result |= {a + "time_decay": (1, 1, INNER), a + "time_faaaa": (HEADS, WIDTH)}
        result |= {a + f"time_maa_{c}": (1, 1, D) for c in "xwkvrg"}
        result |= {a + "time_maa_w1": (D, 5 * MIX), a + "time_maa_w2": (5, MIX, D)}
        result |= {a + "time_decay_w1": (D, DECAY), a + "time_decay_w2": (DECAY, INNER)}
        result |= {a + f"{m}.weight": (INNER, D) for m in ("receptance", "key", "value", "gate")}
        result |= {a + "output.weight": (D, INNER), a + "ln_x.weight": (INNER,), a + "ln_x.bias": (INNER,)}
        result |= {f + f"time_maa_{c}": (1, 1, D) for c in "kr"}
        result |= {f + "key.weight": (FF, D), f + "receptance.weight": (D, D), f + "value.weight": (D, FF)}
    return result


def tensors() -> dict[str, Tensor]:
    return drawn(shapes())


def time_mix(get: Weights, at: str, x: np.ndarray, old: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Section 4.2: ddlerp, then lora for the decay."""
    low = np.tanh((x + (old - x) * get(f"{at}.time_maa_x")) @ get(f"{at}.time_maa_w1"))
    mixed = {}
    for n, letter in enumerate("wkvrg"):
        lora = low[n * MIX : (n + 1) * MIX] @ get(f"{at}.time_maa_w2")[n]
        mixed[letter] = x + (old - x) * (get(f"{at}.time_maa_{letter}") + lora)
    r = get(f"{at}.receptance.weight") @ mixed["r"]
    k = get(f"{at}.key.weight") @ mixed["k"]
    v = get(f"{at}.value.weight") @ mixed["v"]
    gate = get(f"{at}.gate.weight") @ mixed["g"]
    speed = get(f"{at}.time_decay") + np.tanh(mixed["w"] @ get(f"{at}.time_decay_w1")) @ get(
        f"{at}.time_decay_w2"
    )
    bonus, y = get(f"{at}.time_faaaa"), np.zeros(INNER)
    for h in range(HEADS):
        for j in range(WIDTH):  # one value channel
            value = v[h * WIDTH + j]
            for i in range(WIDTH):  # one key channel
                c = h * WIDTH + i
                y[h * WIDTH + j] += r[c] * (states[h, i, j] + bonus[h, i] * k[c] * value)
                states[h, i, j] = states[h, i, j] * np.exp(-np.exp(speed[c])) + k[c] * value
        mine = slice(h * WIDTH, (h + 1) * WIDTH)
        y[mine] = layer_norm(
            y[mine], get(f"{at}.ln_x.weight")[mine], get(f"{at}.ln_x.bias")[mine], 1e-5 * 8**2
        )
    return get(f"{at}.output.weight") @ (y * gate * sigmoid(gate))


def channel_mix(get: Weights, at: str, x: np.ndarray, old: np.ndarray) -> np.ndarray:
    k = get(f"{at}.key.weight") @ (x + (old - x) * get(f"{at}.time_maa_k"))
    r = get(f"{at}.receptance.weight") @ (x + (old - x) * get(f"{at}.time_maa_r"))
    return sigmoid(r) * (get(f"{at}.value.weight") @ np.where(k > 0, k, 0) ** 2)


def oracle(config: Mapping[str, Any], tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    names = {ported(name): name for name in shapes()}
    get = Weights({names.get(name, name): t for name, t in tensors.items()})
    eps, rows = config["layer_norm_epsilon"], []
    for row in ids.tolist():
        old = np.zeros((LAYERS, 2, D))
        states = np.zeros((LAYERS, HEADS, WIDTH, WIDTH))
        for token in row:
            x = get.norm("blocks.0.ln0", get("emb.weight")[token], eps)
            for i in range(LAYERS):
                h = get.norm(f"blocks.{i}.ln1", x, eps)
                x, old[i, 0] = x + time_mix(get, f"blocks.{i}.att", h, old[i, 0], states[i]), h
                h = get.norm(f"blocks.{i}.ln2", x, eps)
                x, old[i, 1] = x + channel_mix(get, f"blocks.{i}.ffn", h, old[i, 1]), h
            rows.append(get("head.weight") @ get.norm("ln_out", x, 1e-5))
    return torch.from_numpy(np.stack(rows)).float().view(*ids.shape, -1)


def wrong(spec: Any) -> Any:
    return change(spec, "ssm", eps=1e-5)


CASES = [
    Case(name="rwkv-6", oracle=oracle, config=CONFIG, tensors=tensors, wrong=wrong),
    Case(
        name="rwkv-6-port",
        oracle=oracle,
        config=CONFIG | {"architectures": ["Rwkv6ForCausalLM"]},
        tensors=lambda: {ported(name): t for name, t in tensors().items()},
        wrong=wrong,
    ),
]
