"""GPT-1 (Radford et al. 2018): norms after the sum, no final norm, "gelu" means its tanh form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.spec import FFN, Attn, Layer, Norm, Spec

ARCHITECTURE = "OpenAIGPTLMHeadModel"
MODEL_TYPE = "openai-gpt"
CLASSIFIER = "OpenAIGPTForSequenceClassification"
CHECKPOINTS = ("openai-community/openai-gpt",)
MEANS = {"gelu": "gelu_new", "relu": "relu", "silu": "silu", "swish": "silu"}

RULES = r"""
table @=transformer.h.{i} ~=transformer
prefix? transformer.
drop \.attn\.bias$ position_ids$
~.{tokens_embed,positions_embed} -> {embed,pos}; @.{ln_1,ln_2} -> {p1,p2}; lm_head -> head
@.attn.c_attn -> mix.qkv : T; @.attn.c_proj -> mix.o : T
@.mlp.c_fc -> ffn.inp : T; @.mlp.c_proj -> ffn.out : T
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    d, heads = keys.size(config, "n_embd", "hidden_size"), keys.size(config, "n_head", "num_attention_heads")
    norm = Norm(kind="layer", eps=keys.positive(config, "layer_norm_epsilon", default=1e-5), bias=True)
    act = keys.word(config, "afn", known=MEANS, default="gelu")
    width = keys.head_dim(d, heads, "n_head")
    layer = Layer(
        attn=Attn(n_head=heads, n_kv=heads, head_dim=width, qkv_bias=True, o_bias=True),
        ffn=FFN(kind="mlp", d_ff=4 * d, act=act, bias=True),
        norm=norm,
        pre=False,
        post="sum",
    )
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(layer,) * keys.size(config, "n_layer", "num_hidden_layers"),
        final_norm=None,
        max_pos=keys.size(config, "n_positions", "max_position_embeddings", default=512),
        pos="learned",
        tie=keys.flag(config, "tie_word_embeddings", default=True),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    first = value.layers[0]
    return {
        "n_embd": value.d,
        "n_head": first.attn.n_head,
        "n_layer": len(value.layers),
        "n_positions": value.max_pos,
        "vocab_size": value.vocab,
        "afn": "gelu" if first.ffn.act == "gelu_new" else first.ffn.act,
        "layer_norm_epsilon": first.norm.eps,
        "tie_word_embeddings": value.tie,
    }
