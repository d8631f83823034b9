"""YaLM-100B against an oracle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.families import LAYERS, VOCAB, Case, drawn, wrong_ffn, wrong_spec

D, NARROW, HEADS, INNER = 48, 20, 3, 88
CONFIG: dict[str, Any] = {
    "model_type": "yalm",
    "hidden_size": D,
    "embedding_size": NARROW,
    "intermediate_size": INNER,
    "num_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "padded_vocab_size": VOCAB,
    "layernorm_epsilon": 1e-5,
    "activation_type": "geglu",
    "pos_encoding_type": "rotary",
}


def weights() -> dict[str, Tensor]:
    top, shapes = "language_model.", {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    shapes[top + "embedding.word_embeddings.weight"] = (VOCAB, NARROW)
    norm(top + "projector.input_layernorm", NARROW)
    for i in range(LAYERS):
        at = f"{top}transformer.layers.{i}."
        if i:
            norm(at + "input_layernorm", D)
        norm(at + "post_attention_layernorm", D)
        linear(at + "attention.query_key_value", 3 * D, D)
        linear(at + "attention.dense", D, D)
        linear(at + "mlp.dense_ffn_hidden", INNER, D)
        linear(at + "mlp.dense_ffn_gate", INNER, D)
        linear(at + "mlp.dense_ffn_output", D, INNER)
    norm(top + "output_layer.input_layer_norm", D)
    linear(top + "output_layer.dense", NARROW, D)
    norm(top + "output_layer.output_layer_norm", NARROW)
    shapes[top + "output_layer.output_bias"] = (VOCAB,)
    return drawn(shapes)


def oracle(config: Mapping[str, Any], w: Mapping[str, Tensor], ids_BT: Tensor) -> Tensor:
    """Whole rows; heads as the axis that einsum names; rotation by a matrix per position."""
    top, width = "language_model.", D // HEADS

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.einsum("btd,fd->btf", x, w[name + ".weight"]) + w[name + ".bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + config["layernorm_epsilon"]).sqrt() * w[name + ".weight"] + w[
            name + ".bias"
        ]

    length = ids_BT.shape[1]
    turn = torch.zeros(length, width, width)
    for t in range(length):
        for f in range(width // 2):
            angle = torch.tensor(t * 1e-4 ** (2 * f / width))
            g = f + width // 2
            turn[t, f, f] = turn[t, g, g] = angle.cos()
            turn[t, g, f], turn[t, f, g] = angle.sin(), -angle.sin()

    x = norm(w[top + "embedding.word_embeddings.weight"][ids_BT], top + "projector.input_layernorm")
    x = x @ torch.eye(NARROW, D)
    for i in range(config["num_layers"]):
        at = f"{top}transformer.layers.{i}."
        h = norm(x, at + "input_layernorm") if i else x
        q, k, v = linear(h, at + "attention.query_key_value").unflatten(-1, (HEADS, 3, width)).unbind(3)
        q, k = (torch.einsum("tef,bthf->bthe", turn, y) for y in (q, k))
        scores = torch.einsum("bthe,bshe->bhts", q, k) / width**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1) == 1, -10000.0)
        mixed = torch.einsum("bhts,bshe->bthe", scores.softmax(-1), v).flatten(2)
        x = x + linear(mixed, at + "attention.dense")
        h = norm(x, at + "post_attention_layernorm")
        inner = F.gelu(linear(h, at + "mlp.dense_ffn_hidden")) * linear(h, at + "mlp.dense_ffn_gate")
        x = x + linear(inner, at + "mlp.dense_ffn_output")
    out = F.gelu(linear(norm(x, top + "output_layer.input_layer_norm"), top + "output_layer.dense"))
    out = norm(out, top + "output_layer.output_layer_norm")
    return out @ w[top + "embedding.word_embeddings.weight"].T + w[top + "output_layer.output_bias"]


CASES = [
    Case(name="yalm", oracle=oracle, config=CONFIG, tensors=weights, wrong=wrong_ffn(act="gelu_new")),
    Case(
        name="yalm-way-out",
        oracle=oracle,
        config=CONFIG | {"num_layers": 1},
        tensors=lambda: {
            k: t for k, t in weights().items() if not any(f"layers.{i}." in k for i in (1, 2, 3))
        },
        wrong=wrong_spec(head_act="gelu_new"),
    ),
]
