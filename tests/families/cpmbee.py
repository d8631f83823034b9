"""CPM-Bee against a slow oracle: one pair of tokens, one head at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from caravan.model.checkpoint import load_backbone
from tests.families import VOCAB, Case, drawn, wrong_spec
from tests.families.bert import rebuild

BEE: dict[str, Any] = {
    "model_type": "cpmbee",
    "architectures": ["CpmBeeForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "dim_head": 10,
    "dim_ff": 88,
    "num_hidden_layers": 3,
    "position_bias_num_buckets": 16,
    "position_bias_num_segment_buckets": 4,
    "position_bias_max_distance": 32,
    "eps": 1e-6,
    "distance_scale": 16,
    "dtype": "float32",
}


def weights(tied: bool = True) -> dict[str, Tensor]:
    d, inner, width = BEE["hidden_size"], 60, BEE["dim_ff"]
    shapes: dict[str, tuple[int, ...]] = {
        "cpmbee.input_embedding.weight": (VOCAB, d),
        "cpmbee.position_bias.relative_attention_bias": (20, 6),
        "cpmbee.encoder.output_layernorm.weight": (d,),
    }
    for i in range(BEE["num_hidden_layers"]):
        at = f"cpmbee.encoder.layers.{i}"
        shapes[f"{at}.self_att.layernorm_before_attention.weight"] = (d,)
        for name in ("project_q", "project_k", "project_v"):
            shapes[f"{at}.self_att.self_attention.{name}.weight"] = (inner, d)
        shapes[f"{at}.self_att.self_attention.attention_out.weight"] = (d, inner)
        shapes[f"{at}.ffn.layernorm_before_ffn.weight"] = (d,)
        shapes[f"{at}.ffn.ffn.w_in.w_0.weight"] = shapes[f"{at}.ffn.ffn.w_in.w_1.weight"] = (width, d)
        shapes[f"{at}.ffn.ffn.w_out.weight"] = (d, width)
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, d)
    return drawn(shapes)


def bucket(distance: int, buckets: int, furthest: int) -> int:
    """Row of the bias table for key minus query."""
    half = buckets // 2
    side = half if distance > 0 else 0
    n, exact = abs(distance), half // 2
    if n < exact:
        return side + n
    far = exact + int(math.log(n / exact) / math.log(furthest / exact) * (half - exact))
    return side + min(far, half - 1)


def embedded(config: Mapping[str, Any], table: Tensor, token: int, sub: int) -> Tensor:
    """A token's embedding / sqrt(d), its halves turned by sub * 16 as if it were a position."""
    d = config["hidden_size"]
    x = table[token] / math.sqrt(d)
    out = x.clone()
    for f in range(d // 2):
        angle = sub * config["distance_scale"] / 10000 ** (2 * f / d)
        a, b = x[f], x[f + d // 2]
        out[f] = a * math.cos(angle) - b * math.sin(angle)
        out[f + d // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


PLAIN = {"sub": 0, "context": False, "sample": 0, "segment": 0, "count": 1, "offset": 0}


def states(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], ids: list[int],
    facts: list[dict[str, Any]] | None = None, edges: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """[T, D] of one sequence; `facts` says per token what `model.encoders.cpm.Graph` does."""
    facts, edges = facts or [PLAIN] * len(ids), edges or [0]
    w = {key.removeprefix("cpmbee."): t for key, t in tensors.items()}
    heads, width, length = config["num_attention_heads"], config["dim_head"], len(ids)
    rows = config["position_bias_num_buckets"]
    bias = torch.full((heads, length, length), float("-inf"))
    for i, q in enumerate(facts):
        for j, k in enumerate(facts):
            edge = q["segment"] * q["count"] + k["segment"] + q["offset"]
            kind = edges[edge] if q["sample"] == k["sample"] else 1
            row = bucket(j - i, rows, config["position_bias_max_distance"]) if kind == 0 else rows + kind - 1
            known = k["context"] or (not q["context"] and j <= i)
            if known and (q["sample"] == 0 or q["sample"] == k["sample"]):
                bias[:, i, j] = w["position_bias.relative_attention_bias"][row]
    table = w["input_embedding.weight"]
    x = torch.stack([embedded(config, table, t, f["sub"]) for t, f in zip(ids, facts, strict=True)])

    def norm(y: Tensor, gain: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + config["eps"]).sqrt() * gain

    for n in range(config["num_hidden_layers"]):
        a, f = f"encoder.layers.{n}.self_att.", f"encoder.layers.{n}.ffn."
        h = norm(x, w[a + "layernorm_before_attention.weight"])
        q, k, v = (h @ w[f"{a}self_attention.project_{c}.weight"].T for c in "qkv")
        out = []
        for e in range(heads):
            part = slice(e * width, (e + 1) * width)
            out.append(torch.softmax(q[:, part] @ k[:, part].T / width**0.5 + bias[e], -1) @ v[:, part])
        x = x + torch.cat(out, 1) @ w[a + "self_attention.attention_out.weight"].T
        h = norm(x, w[f + "layernorm_before_ffn.weight"])
        gate = torch.nn.functional.gelu(h @ w[f + "ffn.w_in.w_0.weight"].T)
        x = x + (gate * (h @ w[f + "ffn.w_in.w_1.weight"].T)) @ w[f + "ffn.w_out.weight"].T
    return norm(x, w["encoder.output_layernorm.weight"])


def oracle(config: Mapping[str, Any], tensors: Mapping[str, Tensor], ids_BT: Tensor) -> Tensor:
    head = tensors.get("lm_head.weight", tensors["cpmbee.input_embedding.weight"])
    rows = [states(config, tensors, row) / config["hidden_size"] ** 0.5 @ head.T for row in ids_BT.tolist()]
    return torch.stack(rows)


def case(name: str, wrong: Any, tied: bool) -> Case:
    return Case(
        name=name,
        oracle=oracle,
        config=BEE | {"tie_word_embeddings": tied},
        tensors=lambda: weights(tied),
        wrong=wrong,
        load=load_backbone,
        rebuild=rebuild,
        decode="the bias belongs to pairs of tokens; the engine has no place for it",
    )


CASES = [
    case("cpmbee", wrong_spec(max_pos=64), tied=True),
    case("cpmbee-own-head", wrong_spec(buckets=14, segments=6), tied=False),
]
