"""ChatGLM 2 and 3 in their own layout made from an equivalent GLM; ChatGLM-6B against an oracle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.families import (
    LAYERS,
    VOCAB,
    Case,
    causal,
    drawn,
    ids,
    renamed,
    rewrite,
    theta,
    wrong_layer,
    wrong_rope,
)
from tests.families.glm import GLM

NAMES = {
    "model.layers": "transformer.encoder.layers",
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.norm": "transformer.encoder.final_layernorm",
    "lm_head": "transformer.output_layer",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


def disguise(folder: Path) -> None:
    """GLM's folder as ChatGLM 2 and 3 were released."""

    def config(old: dict[str, Any]) -> dict[str, Any]:
        return {
            "model_type": "chatglm",
            "hidden_size": 48,
            "num_attention_heads": 6,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "kv_channels": 12,
            "ffn_hidden_size": 88,
            "num_layers": LAYERS,
            "layernorm_epsilon": old["rms_norm_eps"],
            "padded_vocab_size": VOCAB,
            "seq_length": 64,
            "rmsnorm": True,
            "post_layer_norm": True,
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "apply_residual_connection_post_layernorm": False,
            "original_rope": True,
            "rope_ratio": theta(old) / 1e4,
            "tie_word_embeddings": False,
        }

    def tensors(old: dict[str, Tensor]) -> dict[str, Tensor]:
        new = {"model.rotary_pos_emb.inv_freq": torch.ones(3)}
        for name, tensor in old.items():
            if ".q_proj." in name:
                parts = [old[name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"]
                new[name.replace("self_attn.q_proj", "self_attention.query_key_value")] = torch.cat(parts)
            elif ".k_proj." not in name and ".v_proj." not in name:
                new[name] = tensor
        return renamed(new, NAMES)

    rewrite(folder, config, tensors)


# ------------------------------------------------------------------------------------------ ChatGLM-6B

D, HEADS, E, INNER, START = 48, 3, 16, 100, 2
FIRST: dict[str, Any] = {
    "model_type": "chatglm",
    "hidden_size": D,
    "num_attention_heads": HEADS,
    "num_layers": LAYERS,
    "inner_hidden_size": INNER,
    "layernorm_epsilon": 1e-5,
    "max_sequence_length": 64,
    "position_encoding_2d": True,
    "vocab_size": VOCAB,
    "bos_token_id": START,
    "gmask_token_id": 1,
}


def weights() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (VOCAB, D)}
    for i in range(LAYERS):
        at = f"transformer.layers.{i}."
        for name, rows, columns in (
            ("attention.query_key_value", 3 * D, D),
            ("attention.dense", D, D),
            ("mlp.dense_h_to_4h", INNER, D),
            ("mlp.dense_4h_to_h", D, INNER),
        ):
            shapes |= {f"{at}{name}.weight": (rows, columns), f"{at}{name}.bias": (rows,)}
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{at}{name}.weight": (D,), f"{at}{name}.bias": (D,)}
    shapes |= {f"transformer.final_layernorm.{x}": (D,) for x in ("weight", "bias")}
    result = drawn(shapes)
    return result | {"lm_head.weight": result["transformer.word_embeddings.weight"].clone()}


def with_start() -> Tensor:
    """Rows whose text is asked for after 7 and after 5 tokens."""
    rows = ids()
    rows[0, 6:8] = torch.tensor([1, START])
    rows[1, 4:6] = torch.tensor([1, START])
    return rows


def oracle(config: Mapping[str, Any], w: Mapping[str, Tensor], ids_BT: Tensor) -> Tensor:
    """One text at a time, one head at a time, one pair of dimensions at a time."""
    import torch.nn.functional as F

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (D,), w[name + ".weight"], w[name + ".bias"], config["layernorm_epsilon"])

    def turned(x: Tensor, places: list[list[int]]) -> Tensor:
        out = x.clone()
        half, quarter = E // 2, E // 4
        for t in range(len(x)):
            for section, place in enumerate(places):  # the head's halves turn by different positions
                for f in range(quarter):
                    frequency = torch.tensor(1.0 / 10000 ** (2 * f / half)).half().float()
                    angle = place[t] * frequency
                    a, b = half * section + f, half * section + f + quarter
                    out[t, a] = x[t, a] * angle.cos() - x[t, b] * angle.sin()
                    out[t, b] = x[t, b] * angle.cos() + x[t, a] * angle.sin()
        return out

    weight = (2 * config["num_layers"]) ** 0.5
    answers = []
    for row in ids_BT.tolist():
        context = row.index(START) if START in row else 0
        blank = max(context - 1, 0)  # the mask that is filled stands just before the start
        places = [
            [t if t < context else blank for t in range(len(row))],
            [0 if t < context else t - context + 1 for t in range(len(row))],
        ]
        seen = torch.ones(len(row), len(row)).tril()
        seen[:context, :context] = 1
        x = w["transformer.word_embeddings.weight"][row]
        for i in range(config["num_layers"]):
            at = f"transformer.layers.{i}."
            h = norm(x, at + "input_layernorm")
            parts = linear(h, at + "attention.query_key_value").view(len(row), HEADS, 3, E)
            heads = []
            for n in range(HEADS):
                q, k = turned(parts[:, n, 0], places), turned(parts[:, n, 1], places)
                scores = (q / (E**0.5 * (i + 1))) @ k.T * (i + 1)
                heads.append(scores.masked_fill(seen == 0, -10000.0).softmax(-1) @ parts[:, n, 2])
            x = h * weight + linear(torch.cat(heads, 1), at + "attention.dense")
            h = norm(x, at + "post_attention_layernorm")
            inner = F.gelu(linear(h, at + "mlp.dense_h_to_4h"), approximate="tanh")
            x = h * weight + linear(inner, at + "mlp.dense_4h_to_h")
        answers.append(norm(x, "transformer.final_layernorm") @ w["lm_head.weight"].T)
    return torch.stack(answers)


CASES = [
    Case(
        name="chatglm2",
        hf=causal("Glm", GLM | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5,
                                                    "partial_rotary_factor": 0.5}}),
        disguise=disguise,
        wrong=wrong_rope(theta=1e4),
        reload="transformers has no class for it",
    ),
    Case(
        name="chatglm-6b",
        oracle=oracle,
        config=FIRST,
        tensors=weights,
        ids=with_start,
        wrong=wrong_layer(alpha=2.8),
    ),
    Case(
        name="chatglm-6b-rounded",
        oracle=oracle,
        config=FIRST,
        tensors=weights,
        ids=with_start,
        tolerance=1e-5,  # rounded frequencies differ by 6e-5 at position 20
        wrong=wrong_rope(fp16_frequencies=False),
        decode="shown by the case before",
    ),
]  # fmt: skip
