"""Qwen 1, in its own layout made from an equivalent Qwen 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.families import LAYERS, LLAMA, VOCAB, Case, causal, renamed, rewrite, theta, wrong_rope

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


CASES = [
    Case(
        name="qwen",
        hf=causal("Qwen2", LLAMA | {"num_key_value_heads": 6}),
        disguise=disguise,
        wrong=wrong_rope(theta=2e4),
        reload="transformers has no class for it",
    )
]
