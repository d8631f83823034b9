"""Baichuan: the 7B in their own layout made from an equivalent Llama, the 13B against an oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.families import (
    LAYERS,
    LLAMA,
    VOCAB,
    Case,
    causal,
    drawn,
    rewrite,
    theta,
    wrong_attn,
    wrong_spec,
)

MHA = LLAMA | {"num_key_value_heads": 6}
OWN = {k: MHA[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                           "num_attention_heads")}  # fmt: skip
BIG = {**OWN, "model_type": "baichuan", "model_max_length": 64, "rms_norm_eps": 1e-6,
       "hidden_act": "silu", "tie_word_embeddings": False, "z_loss_weight": 0}  # fmt: skip


def disguise(second: bool) -> Callable[[Path], None]:
    """Llama's folder as Baichuan's 7B are; of the second generation the head's rows have any length."""

    def config(old: dict[str, Any]) -> dict[str, Any]:
        more = {"z_loss_weight": 0} if second else {}
        context = {"max_position_embeddings": 64, "model_max_length": 64, "rope_theta": theta(old)}
        norm = {"rms_norm_eps": old["rms_norm_eps"], "tie_word_embeddings": False}
        return {**OWN, **more, **context, **norm, "model_type": "baichuan"}

    def tensors(old: dict[str, Tensor]) -> dict[str, Tensor]:
        new = {}
        for name, tensor in old.items():
            if ".q_proj." in name:
                parts = [old[name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"]
                new[name.replace("q_proj", "W_pack")] = torch.cat(parts)
            elif ".k_proj." not in name and ".v_proj." not in name:
                new[name] = tensor
        if second:
            new["lm_head.weight"] = new["lm_head.weight"] * torch.linspace(0.3, 4.0, VOCAB)[:, None]
        return new

    return lambda folder: rewrite(folder, config, tensors)


def with_unit_rows() -> Any:
    """A Llama whose head has rows of length one."""
    model = causal("Llama", MHA)()
    with torch.no_grad():
        model.lm_head.weight.div_(model.lm_head.weight.norm(dim=1, keepdim=True))
    return model


with_unit_rows.reference = "LlamaForCausalLM"  # type: ignore[attr-defined]


def weights() -> dict[str, Tensor]:
    """Seeded weights of a tiny 13B."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, 48),
        "model.norm.weight": (48,),
        "lm_head.weight": (VOCAB, 48),
    }
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        shapes |= {at + "input_layernorm.weight": (48,), at + "post_attention_layernorm.weight": (48,),
                   at + "self_attn.W_pack.weight": (144, 48), at + "self_attn.o_proj.weight": (48, 48),
                   at + "mlp.gate_proj.weight": (88, 48), at + "mlp.up_proj.weight": (88, 48),
                   at + "mlp.down_proj.weight": (48, 88)}  # fmt: skip
    return drawn(shapes)


def oracle(config: Mapping[str, Any], w: Mapping[str, Tensor], ids_BT: Tensor) -> Tensor:
    """The 13B one text, one head, one query at a time: the bias is slope * key position, which differs from
    slope * distance by a constant of the row."""
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    # slopes of 8 heads are 1/2 .. 1/256; six heads take the four even powers and the first two odd ones
    slopes = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    width = 48 // heads

    def rms(x: Tensor, name: str) -> Tensor:
        return w[name] * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)

    answers = []
    for ids in ids_BT:
        x = w["model.embed_tokens.weight"][ids]
        for i in range(config["num_hidden_layers"]):
            at = f"model.layers.{i}."
            packed = rms(x, at + "input_layernorm.weight") @ w[at + "self_attn.W_pack.weight"].T
            mixed = torch.zeros_like(x)
            for h in range(heads):
                q, k, v = (packed[:, 48 * n + width * h : 48 * n + width * (h + 1)] for n in range(3))
                for t in range(len(ids)):
                    bias = slopes[h] * torch.arange(t + 1)
                    weight = torch.softmax(k[: t + 1] @ q[t] / width**0.5 + bias, 0)
                    mixed[t, width * h : width * (h + 1)] = weight @ v[: t + 1]
            x = x + mixed @ w[at + "self_attn.o_proj.weight"].T
            h = rms(x, at + "post_attention_layernorm.weight")
            gate = h @ w[at + "mlp.gate_proj.weight"].T
            up = h @ w[at + "mlp.up_proj.weight"].T
            x = x + (gate * torch.sigmoid(gate) * up) @ w[at + "mlp.down_proj.weight"].T
        head = w["lm_head.weight"]
        if "z_loss_weight" in config:  # the second generation alone
            head = head / head.norm(dim=1, keepdim=True)
        answers.append(rms(x, "model.norm.weight") @ head.T)
    return torch.stack(answers)


NO_CLASS = "transformers has no class for it"
CASES = [
    Case(
        name="baichuan-7b",
        hf=causal("Llama", MHA),
        disguise=disguise(False),
        wrong=wrong_attn(alibi=True),
        reload=NO_CLASS,
    ),
    Case(
        name="baichuan2-7b",
        hf=with_unit_rows,
        disguise=disguise(True),
        wrong=wrong_spec(head_norm=False),
        reload=NO_CLASS,
    ),
    Case(
        name="baichuan-13b",
        oracle=oracle,
        config={k: v for k, v in BIG.items() if k != "z_loss_weight"},
        tensors=weights,
        wrong=wrong_spec(head_norm=True),
    ),
    Case(name="baichuan2-13b", oracle=oracle, config=BIG, tensors=weights, wrong=wrong_attn(alibi_max=7.0)),
]
