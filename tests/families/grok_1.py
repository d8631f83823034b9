"""Grok-1, for which transformers has no class: against a model in plain loops, written from the published JAX
program. One token, one head and one expert at a time, everything in double precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.families import LAYERS, VOCAB, Case, drawn, wrong_spec
from tests.families.mixtral import wrong_moe

D, HEADS, GROUPS, WIDTH, INNER, EXPERTS = 48, 6, 2, 8, 24, 5

CONFIG = {
    "model_type": "grok-1", "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
    "attn_output_multiplier": 0.6, "max_attn_value": 1.5, "embedding_multiplier_scale": 3.5,
    "output_multiplier_scale": 0.57, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "num_experts": EXPERTS, "num_experts_per_tok": 2, "tie_word_embeddings": True,
}  # fmt: skip


def tensors() -> dict[str, Tensor]:
    """Seeded weights under the names of the PyTorch port."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, D), "model.norm.scale": (D,)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        for name, rows in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            shapes[f"{at}.attn.{name}_proj.weight"] = (rows * WIDTH, D)
        shapes[f"{at}.attn.o_proj.weight"] = (D, HEADS * WIDTH)
        shapes[f"{at}.moe_block.gate.weight"] = (EXPERTS, D)
        for e in range(EXPERTS):
            for name, shape in (("linear", (INNER, D)), ("linear_v", (INNER, D)), ("linear_1", (D, INNER))):
                shapes[f"{at}.moe_block.experts.{e}.{name}.weight"] = shape
        for name in ("pre_attn", "post_attn", "pre_moe", "post_moe"):
            shapes[f"{at}.{name}_norm.scale"] = (D,)
    return drawn(shapes)


def norm(x: Tensor, gain: Tensor) -> Tensor:
    return gain * x / math.sqrt(float((x * x).sum()) / len(x) + 1e-5)


def turned(x: Tensor, position: int) -> Tensor:
    """A head rotated: coordinate f goes with f + WIDTH / 2."""
    out = x.clone()
    for f in range(WIDTH // 2):
        angle = position / 10_000 ** (2 * f / WIDTH)
        a, b = float(x[f]), float(x[f + WIDTH // 2])
        out[f] = a * math.cos(angle) - b * math.sin(angle)
        out[f + WIDTH // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(
    w: Mapping[str, Tensor], at: str, rows: list[Tensor], config: Mapping[str, Any]
) -> list[Tensor]:
    """One answer per token of one text."""
    q, k, v = ([w[f"{at}.attn.{n}_proj.weight"] @ x for x in rows] for n in "qkv")
    answers = []
    for t in range(len(rows)):
        heads = []
        for h in range(HEADS):
            g = h * GROUPS // HEADS
            mine, theirs = slice(h * WIDTH, (h + 1) * WIDTH), slice(g * WIDTH, (g + 1) * WIDTH)
            query = turned(q[t][mine], t)
            weights = []
            for s in range(t + 1):
                score = float(query @ turned(k[s][theirs], s)) * config["attn_output_multiplier"]
                weights.append(
                    math.exp(config["max_attn_value"] * math.tanh(score / config["max_attn_value"]))
                )
            heads.append(sum(x / sum(weights) * v[s][theirs] for s, x in enumerate(weights)))
        answers.append(w[f"{at}.attn.o_proj.weight"] @ torch.cat(heads))  # type: ignore[arg-type]
    return answers


def mixture(w: Mapping[str, Tensor], at: str, x: Tensor, top: int) -> Tensor:
    logits = (w[f"{at}.moe_block.gate.weight"] @ x).tolist()
    total = sum(math.exp(z) for z in logits)
    out = torch.zeros_like(x)
    for e in sorted(range(len(logits)), key=logits.__getitem__)[-top:]:
        home = f"{at}.moe_block.experts.{e}"
        inner = gelu(w[f"{home}.linear.weight"] @ x) * (w[f"{home}.linear_v.weight"] @ x)
        out += math.exp(logits[e]) / total * (w[f"{home}.linear_1.weight"] @ inner)
    return out


def oracle(config: Mapping[str, Any], weights: Mapping[str, Tensor], ids_BT: Tensor) -> Tensor:
    w = {name: tensor.double() for name, tensor in weights.items()}
    table = w["model.embed_tokens.weight"]
    texts = []
    for ids in ids_BT.tolist():
        rows = [table[i] * config["embedding_multiplier_scale"] for i in ids]
        for i in range(config["num_hidden_layers"]):
            at = f"model.layers.{i}"
            gain = {n: w[f"{at}.{n}_norm.scale"] for n in ("pre_attn", "post_attn", "pre_moe", "post_moe")}
            seen = attention(w, at, [norm(x, gain["pre_attn"]) for x in rows], config)
            rows = [x + norm(y, gain["post_attn"]) for x, y in zip(rows, seen, strict=True)]
            top = config["num_experts_per_tok"]
            rows = [x + norm(mixture(w, at, norm(x, gain["pre_moe"]), top), gain["post_moe"]) for x in rows]
        final = torch.stack([norm(x, w["model.norm.scale"]) for x in rows])
        texts.append(final @ table.T * config["output_multiplier_scale"])
    return torch.stack(texts).float()


CASES = [
    Case(
        name="grok_1", oracle=oracle, config=CONFIG, tensors=tensors, wrong=wrong_moe(renorm=True),
    ),
    Case(
        name="grok_1-three",
        oracle=oracle,
        config=CONFIG | {"num_experts_per_tok": 3, "max_attn_value": 0.7},
        tensors=tensors,
        wrong=wrong_spec(embed_scale=3.4),
    ),
]  # fmt: skip
