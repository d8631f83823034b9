"""RWKV-7, held against the published equations worked one token and one head at a time in numpy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.families import LAYERS, VOCAB, Case, change, drawn
from tests.families.rwkv5 import Weights, layer_norm, norms, sigmoid

D, HEADS, WIDTH, FF = 48, 6, 8, 64
RANKS = {"w": 7, "a": 5, "v": 4, "g": 9}

CONFIG: dict[str, Any] = {
    "model_type": "rwkv7",
    "vocab_size": VOCAB,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "head_dim": WIDTH,
    "decay_low_rank_dim": RANKS["w"],
    "a_low_rank_dim": RANKS["a"],
    "v_low_rank_dim": RANKS["v"],
    "gate_low_rank_dim": RANKS["g"],
    "intermediate_size": FF,
    "norm_eps": 1e-4,
    "tie_word_embeddings": False,
}

PORT = {
    "emb.": "model.embeddings.", "ln_out.": "model.norm.", "head.": "lm_head.", "blocks.": "model.layers.",
    ".ln0.": ".pre_norm.", ".ln1.": ".attn_norm.", ".ln2.": ".ffn_norm.",
    ".att.": ".attn.", ".receptance.": ".r_proj.", ".attn.key.": ".attn.k_proj.",
    ".attn.value.": ".attn.v_proj.", ".output.": ".o_proj.", ".ln_x.": ".g_norm.",
}  # fmt: skip
"""The author's names -> those of flash-linear-attention, except the low-rank maps."""


def ported(name: str) -> str:
    for old, new in PORT.items():
        name = name.replace(old, new)
    place = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}
    return re.sub(r"\.([wavg])([012])$", lambda m: f".{m[1]}_lora.lora.{place[m[2]]}", name)


def shapes() -> dict[str, tuple[int, ...]]:
    result = {"emb.weight": (VOCAB, D), "head.weight": (VOCAB, D), **norms("ln_out", "blocks.0.ln0")}
    for i in range(LAYERS):
        a, f = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        result |= norms(f"blocks.{i}.ln1", f"blocks.{i}.ln2", f"blocks.{i}.att.ln_x")
        result |= {a + f"x_{c}": (1, 1, D) for c in "rwkvag"}
        result |= {a + name: (1, 1, D) for name in ("w0", "a0", "k_k", "k_a", *(("v0",) if i else ()))}
        for c, rank in RANKS.items():
            if c != "v" or i:
                result |= {a + f"{c}1": (D, rank), a + f"{c}2": (rank, D)}
        result |= {a + "r_k": (HEADS, WIDTH)}
        result |= {a + f"{m}.weight": (D, D) for m in ("receptance", "key", "value", "output")}
        result |= {f + "x_k": (1, 1, D), f + "key.weight": (FF, D), f + "value.weight": (D, FF)}
    return result


def tensors() -> dict[str, Tensor]:
    return {name: t * 3 if name.endswith("k_k") else t for name, t in drawn(shapes()).items()}


def unused() -> dict[str, Tensor]:
    """What some of the author's files have besides: a value mix of the first layer."""
    more = {"v0": (1, 1, D), "v1": (D, RANKS["v"]), "v2": (RANKS["v"], D)}
    return tensors() | drawn({f"blocks.0.att.{name}": shape for name, shape in more.items()})


def port_tensors() -> dict[str, Tensor]:
    result = {}
    for name, t in tensors().items():
        new = ported(name)
        if new.endswith("lora.0.weight") or new.endswith("lora.2.weight"):
            t = t.T.contiguous()
        elif t.dim() == 3 and ".attn.x_" not in new:
            t = t.flatten()
        result[new] = t
    return result


def unported(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {ported(name): name for name in shapes()}
    turned = ("lora.0.weight", "lora.2.weight")
    return {names.get(n, n): t.T if n.endswith(turned) else t for n, t in tensors.items()}


def time_mix(
    get: Weights, at: str, x: np.ndarray, old: np.ndarray, states: np.ndarray, first: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Section 4.1; returns the output and the first layer's values."""
    mixed = {c: x + (old - x) * get(f"{at}.x_{c}") for c in "rwkvag"}
    r, k, v = (
        get(f"{at}.{name}.weight") @ mixed[c]
        for name, c in (("receptance", "r"), ("key", "k"), ("value", "v"))
    )
    w = np.exp(
        -0.6065306597126334
        * sigmoid(get(f"{at}.w0") + np.tanh(mixed["w"] @ get(f"{at}.w1")) @ get(f"{at}.w2"))
    )
    a = sigmoid(get(f"{at}.a0") + mixed["a"] @ get(f"{at}.a1") @ get(f"{at}.a2"))
    g = sigmoid(mixed["g"] @ get(f"{at}.g1")) @ get(f"{at}.g2")
    if first is None:
        first = v
    else:
        share = sigmoid(get(f"{at}.v0") + mixed["v"] @ get(f"{at}.v1") @ get(f"{at}.v2"))
        v = v * (1 - share) + first * share
    removal, k = k * get(f"{at}.k_k"), k * (1 + (a - 1) * get(f"{at}.k_a"))
    y = np.empty(D)
    for h in range(HEADS):
        m = slice(h * WIDTH, (h + 1) * WIDTH)
        kappa = removal[m] / np.linalg.norm(removal[m])
        transition = np.diag(w[m]) - np.outer(kappa, a[m] * kappa)
        states[h] = states[h] @ transition + np.outer(v[m], k[m])
        out = layer_norm(
            states[h] @ r[m], get(f"{at}.ln_x.weight")[m], get(f"{at}.ln_x.bias")[m], WIDTH * 1e-4
        )
        y[m] = out + (r[m] * get(f"{at}.r_k")[h]) @ k[m] * v[m]
    return get(f"{at}.output.weight") @ (y * g), first


def oracle(config: Mapping[str, Any], tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    get, eps, rows = Weights(unported(tensors)), config["norm_eps"], []
    for row in ids.tolist():
        old, states = np.zeros((LAYERS, 2, D)), np.zeros((LAYERS, HEADS, WIDTH, WIDTH))
        for token in row:
            x, first = get.norm("blocks.0.ln0", get("emb.weight")[token], eps), None
            for i in range(LAYERS):
                h = get.norm(f"blocks.{i}.ln1", x, eps)
                y, first = time_mix(get, f"blocks.{i}.att", h, old[i, 0], states[i], first)
                x, old[i, 0] = x + y, h
                h = get.norm(f"blocks.{i}.ln2", x, eps)
                k = get(f"blocks.{i}.ffn.key.weight") @ (h + (old[i, 1] - h) * get(f"blocks.{i}.ffn.x_k"))
                x, old[i, 1] = x + get(f"blocks.{i}.ffn.value.weight") @ np.maximum(k, 0) ** 2, h
            rows.append(get("head.weight") @ get.norm("ln_out", x, eps))
    return torch.from_numpy(np.stack(rows)).float().view(*ids.shape, -1)


def wrong(spec: Any) -> Any:
    return change(spec, "ssm", eps=1e-5)


CASES = [
    Case(name="rwkv-7", oracle=oracle, config=CONFIG, tensors=tensors, wrong=wrong),
    Case(name="rwkv-7-unused", oracle=oracle, config=CONFIG, tensors=unused, wrong=wrong),
    Case(
        name="rwkv-7-port",
        oracle=oracle,
        config=CONFIG | {"architectures": ["RWKV7ForCausalLM"]},
        tensors=port_tensors,
        wrong=wrong,
    ),
]
