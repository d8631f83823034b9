"""InternLM 2, in its own layout made from an equivalent Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.families import LLAMA, Case, causal, renamed, rewrite, theta, wrong_attn, wrong_rope

NAMES = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def disguise(folder: Path) -> None:
    """Llama's folder as InternLM 2 writes it: each group's queries, key and value together."""

    def config(old: dict[str, Any]) -> dict[str, Any]:
        same = {k: old[k] for k in LLAMA} | {"rms_norm_eps": old["rms_norm_eps"]}
        return same | {"model_type": "internlm2", "bias": old["attention_bias"], "rope_theta": theta(old),
                       "rope_scaling": None, "tie_word_embeddings": False}  # fmt: skip

    def tensors(old: dict[str, Tensor]) -> dict[str, Tensor]:
        new = {}
        for name, tensor in old.items():
            if ".q_proj." in name:
                k, v = (old[name.replace(".q_proj.", f".{x}_proj.")] for x in "kv")
                rows = []
                for group in range(2):  # three query heads of width 8, then the key, then the value
                    rows += [tensor[24 * group : 24 * (group + 1)], k[8 * group : 8 * (group + 1)]]
                    rows.append(v[8 * group : 8 * (group + 1)])
                new[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(rows)
            elif ".k_proj." not in name and ".v_proj." not in name:
                new[name] = tensor
        return renamed(new, NAMES)

    rewrite(folder, config, tensors)


CASES = [
    Case(
        name="internlm2",
        hf=causal("Llama", LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        disguise=disguise,
        wrong=wrong_rope(theta=1e4),
        reload="transformers has no class for it",
    ),
    Case(
        name="internlm2-bias",
        hf=causal("Llama", LLAMA | {"attention_bias": True}),
        disguise=disguise,
        wrong=wrong_attn(scale=0.3),
        reload="transformers has no class for it",
    ),
]
