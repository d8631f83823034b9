"""Qwen 1, in its own layout made from an equivalent Qwen 2; beyond its first context against a slow model of
its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.families import LAYERS, LLAMA, VOCAB, Case, causal, drawn, renamed, rewrite, theta, wrong_rope

NAMES = {
    "model.layers": "transformer.h",
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.gate_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w1",
    "mlp.down_proj": "mlp.c_proj",
}


def disguise(folder: Path) -> None:
    """Qwen 2's folder as Qwen 1 was released."""

    def config(old: dict[str, Any]) -> dict[str, Any]:
        return {
            "model_type": "qwen",
            "hidden_size": 48,
            "num_attention_heads": 6,
            "kv_channels": 8,
            "num_hidden_layers": LAYERS,
            "intermediate_size": 176,
            "vocab_size": VOCAB,
            "layer_norm_epsilon": old["rms_norm_eps"],
            "rotary_emb_base": theta(old),
            "rotary_pct": 1.0,
            "seq_length": 64,
            "no_bias": True,
            "use_dynamic_ntk": True,
            "use_logn_attn": True,
            "tie_word_embeddings": False,
        }

    def tensors(old: dict[str, Tensor]) -> dict[str, Tensor]:
        new = {}
        for name, tensor in old.items():
            if ".q_proj." in name:
                parts = [old[name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"]
                new[name.replace("self_attn.q_proj", "attn.c_attn")] = torch.cat(parts)
            elif ".k_proj." not in name and ".v_proj." not in name:
                new[name] = tensor
        return renamed(new, NAMES)

    rewrite(folder, config, tensors)


LONG: dict[str, Any] = {
    "model_type": "qwen", "hidden_size": 48, "num_attention_heads": 6, "kv_channels": 8, "no_bias": True,
    "num_hidden_layers": 2, "intermediate_size": 88, "vocab_size": VOCAB, "layer_norm_epsilon": 1e-5,
    "rotary_emb_base": 500.0, "rotary_pct": 1.0, "seq_length": 6, "max_position_embeddings": 64,
    "use_dynamic_ntk": True, "use_logn_attn": True, "tie_word_embeddings": False,
}  # fmt: skip
"""The test row of 21 tokens is longer than 6, 12 and less than 24."""


def tensors() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (VOCAB, 48), "transformer.ln_f.weight": (48,)}
    for i in range(2):
        at = f"transformer.h.{i}"
        shapes |= {f"{at}.ln_1.weight": (48,), f"{at}.ln_2.weight": (48,)}
        shapes |= {f"{at}.attn.c_attn.weight": (144, 48), f"{at}.attn.c_attn.bias": (144,)}
        shapes |= {f"{at}.attn.c_proj.weight": (48, 48), f"{at}.mlp.c_proj.weight": (48, 44)}
        shapes |= {f"{at}.mlp.w1.weight": (44, 48), f"{at}.mlp.w2.weight": (44, 48)}
    made = drawn(shapes) | drawn({"transformer.wte.weight": (VOCAB, 48)}, seed=1)
    # scores that matter: a query's growth must show
    return {name: t * 3 if name.endswith("c_attn.weight") else t for name, t in made.items()}


def oracle(config: Mapping[str, Any], w: Mapping[str, Tensor], ids_BT: Tensor) -> Tensor:
    """Row by row and head by head, with the pairs of a head as complex numbers."""
    return torch.stack([_row(config, w, ids_T) for ids_T in ids_BT])


def _row(config: Mapping[str, Any], w: Mapping[str, Tensor], ids_T: Tensor) -> Tensor:
    trained, T = config["seq_length"], len(ids_T)
    base = float(config["rotary_emb_base"])
    if config["use_dynamic_ntk"] and trained < T:
        alpha = 1
        while trained * (alpha + 1) < 2 * T:  # 1, 3, 7, ...: one less than a power of two
            alpha = 2 * alpha + 1
        base *= alpha ** (8 / 6)
    turns = torch.tensor([[p * base ** (-f / 4) for f in range(4)] for p in range(T)])
    spin = torch.polar(torch.ones_like(turns), turns)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config["layer_norm_epsilon"]).sqrt() * w[name]

    def turned(x: Tensor) -> Tensor:
        pairs = torch.complex(x[:, :4], x[:, 4:]) * spin
        return torch.cat([pairs.real, pairs.imag], 1)

    x = w["transformer.wte.weight"][ids_T]
    for i in range(config["num_hidden_layers"]):
        at = f"transformer.h.{i}"
        qkv = norm(x, f"{at}.ln_1.weight") @ w[f"{at}.attn.c_attn.weight"].T + w[f"{at}.attn.c_attn.bias"]
        heads = []
        for h in range(6):
            q, k, v = (part[:, 8 * h : 8 * h + 8] for part in qkv.split(48, 1))
            q, k = turned(q), turned(k)
            if config["use_logn_attn"]:
                q = q * torch.tensor([[max(1.0, math.log(p + 1, trained))] for p in range(T)])
            seen = [torch.softmax(q[t] @ k[: t + 1].T / math.sqrt(8), 0) @ v[: t + 1] for t in range(T)]
            heads.append(torch.stack(seen))
        x = x + torch.cat(heads, 1) @ w[f"{at}.attn.c_proj.weight"].T
        h = norm(x, f"{at}.ln_2.weight")
        gate, up = h @ w[f"{at}.mlp.w2.weight"].T, h @ w[f"{at}.mlp.w1.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"{at}.mlp.c_proj.weight"].T
    return norm(x, "transformer.ln_f.weight") @ w["lm_head.weight"].T


def longer(name: str, wrong: Any, decode: bool | str = True, **flags: bool) -> Case:
    """A case with texts beyond `seq_length`."""
    return Case(
        name=name, oracle=oracle, config=LONG | flags, tensors=tensors, wrong=wrong, decode=decode,
        reload="transformers has no class for it",
    )  # fmt: skip


REREAD = "the angles of all tokens change when a text outgrows a power of two"

CASES = [
    Case(
        name="qwen",
        hf=causal("Qwen2", LLAMA | {"num_key_value_heads": 6}),
        disguise=disguise,
        wrong=wrong_rope(theta=2e4),
        reload="transformers has no class for it",
    ),
    longer("qwen-longer", wrong_rope(log_from=None), decode=REREAD),
    longer("qwen-ntk", wrong_rope(scaling=None), decode=REREAD, use_logn_attn=False),
    longer("qwen-logn", wrong_rope(log_from=12), use_dynamic_ntk=False),
]
