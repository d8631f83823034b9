"""CPM-Bee against a slow oracle: one pair of tokens, one head at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.families import LENGTH, VOCAB, Case, drawn, wrong_spec
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
    "position_bias_num_segment_buckets": 24,
    "position_bias_max_distance": 32,
    "eps": 1e-6,
    "distance_scale": 16,
    "bos_token_id": 1,
    "answer_token_id": 2,
    "dtype": "float32",
}


def ids() -> Tensor:
    """Two rows of an object each: segments begin at 1, what stands up to the token behind 2 is context."""
    drawn = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    drawn[0, [0, 2, 4, 9, 12, 17]] = 1
    drawn[0, 5] = 2
    drawn[1, [0, 4, 5, 14]] = 1
    drawn[1, 1] = 2
    return drawn


def weights(tied: bool = True) -> dict[str, Tensor]:
    d, inner, width = BEE["hidden_size"], 60, BEE["dim_ff"]
    shapes: dict[str, tuple[int, ...]] = {
        "cpmbee.input_embedding.weight": (VOCAB, d),
        "cpmbee.position_bias.relative_attention_bias": (40, 6),
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


def path(segment: int) -> tuple[str, ...]:
    """From the root to a segment of a flat object: root, key, its text, key, its text, ..."""
    if segment == 0:
        return ()
    key = f"key {(segment - 1) // 2}"
    return (key,) if segment % 2 else (key, "text")


def edge(i: int, j: int) -> int:
    """Kind of the edge from segment i to segment j: 0 within one, else 1 + 8 x steps up + steps down."""
    if i == j:
        return 0
    here, there = path(i), path(j)
    shared = 0
    while shared < min(len(here), len(there)) and here[shared] == there[shared]:
        shared += 1
    return 1 + 8 * (len(here) - shared) + len(there) - shared


def told(config: Mapping[str, Any], ids: list[int]) -> tuple[list[dict[str, Any]], list[int]]:
    """What the text of a flat object says about its tokens, and its table of edges."""
    bos, answer = config["bos_token_id"], config["answer_token_id"]
    context = ids.index(answer) + 2 if answer in ids else 0
    facts, segment = [], -1
    for at, token in enumerate(ids):
        segment += token == bos
        facts.append(PLAIN | {"context": at < context, "segment": max(segment, 0)})
    count = max(segment, 0) + 1
    return [fact | {"count": count} for fact in facts], [
        edge(i, j) for i in range(count) for j in range(count)
    ]


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
    rows = [states(config, tensors, row, *told(config, row)) for row in ids_BT.tolist()]
    return torch.stack(rows) / config["hidden_size"] ** 0.5 @ head.T


def case(name: str, wrong: Any, tied: bool) -> Case:
    return Case(
        name=name,
        oracle=oracle,
        config=BEE | {"tie_word_embeddings": tied},
        tensors=lambda: weights(tied),
        wrong=wrong,
        rebuild=rebuild,
        ids=ids,
    )


CASES = [
    case("cpmbee", wrong_spec(max_pos=64), tied=True),
    case("cpmbee-own-head", wrong_spec(buckets=14, segments=26), tied=False),
]
