"""StarCoder 2 (Lozhkov et al. 2024, arXiv:2402.19173): layer norms, biases everywhere, a plain tanh-GELU FFN,
grouped heads with rotary positions and a window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import llama
from caravan.model.spec import FFN, Norm, Spec

ARCHITECTURE = "Starcoder2ForCausalLM"
CLASSIFIER = "Starcoder2ForSequenceClassification"
CHECKPOINTS = ("bigcode/starcoder2-3b", "bigcode/starcoder2-7b", "bigcode/starcoder2-15b")
RULES = """
table starcoder2 like llama
@.mlp.{c_fc,c_proj} -> ffn.{inp,out}
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec; `use_bias` is about attention and FFN alike."""
    bias = keys.flag(config, "use_bias", default=True)
    full = {"num_key_value_heads": 2, "max_position_embeddings": 4096, "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True, **config, "attention_bias": bias, "mlp_bias": bias}  # fmt: skip
    value = llama.spec(full)
    ffn = replace(value.layers[0].ffn or FFN(kind="mlp", d_ff=1, act="gelu_new"), kind="mlp")
    norm = Norm(kind="layer", eps=keys.real(config, "norm_epsilon", default=1e-5), bias=True)
    window = llama.window(config)
    value = llama.with_layers(llama.with_norm(value, norm), ffn=ffn)
    return llama.with_attention(value, lambda i, attn: replace(attn, window=window))


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    result = llama.config(value)
    layer = value.layers[0]
    del result["rms_norm_eps"], result["attention_bias"], result["mlp_bias"], result["head_dim"]
    return {
        **result,
        "use_bias": layer.attn.qkv_bias,
        "norm_epsilon": layer.norm.eps,
        "sliding_window": layer.attn.window,
    }
