"""GPT-2 (Radford et al. 2019): layer norms, learned positions, plain MLP, biases everywhere, tied head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import llama
from caravan.model.spec import FFN, Attn, Layer, Norm, Spec

ARCHITECTURE = "GPT2LMHeadModel"
CLASSIFIER = "GPT2ForSequenceClassification"
CHECKPOINTS = ("openai-community/gpt2*", "microsoft/DialoGPT-*", "stanford-crfm/*")

RULES = r"""
table @=transformer.h.{i} ~=transformer
prefix? transformer.
drop \.attn\.bias$ \.attn\.masked_bias$
~.{wte,wpe,ln_f} -> {embed,pos,norm}; @.{ln_1,ln_2} -> {n1,n2}; lm_head -> head
@.attn.c_attn -> mix.qkv : T; @.attn.c_proj -> mix.o : T
@.mlp.c_fc -> ffn.inp : T; @.mlp.c_proj -> ffn.out : T
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec; `scale_attn_by_inverse_layer_idx` (CRFM) divides the scores by the layer's
    number."""
    d, heads = keys.size(config, "n_embd"), keys.size(config, "n_head")
    norm = Norm(kind="layer", eps=keys.real(config, "layer_norm_epsilon", default=1e-5), bias=True)
    width = keys.head_dim(d, heads, "n_head")
    scale = width**-0.5 if keys.flag(config, "scale_attn_weights", default=True) else 1.0
    attn = Attn(n_head=heads, n_kv=heads, head_dim=width, qkv_bias=True, o_bias=True, scale=scale)
    act = keys.activation(config, "activation_function", default="gelu_new")
    ffn = FFN(kind="mlp", d_ff=keys.size(config, "n_inner", default=4 * d), act=act, bias=True)
    layer = Layer(attn=attn, ffn=ffn, norm=norm)
    result = Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(layer,) * keys.size(config, "n_layer"),
        final_norm=norm,
        max_pos=keys.size(config, "n_positions"),
        pos="learned",
        tie=keys.flag(config, "tie_word_embeddings", default=True),
    )
    if keys.flag(config, "scale_attn_by_inverse_layer_idx", default=False):
        return llama.with_attention(result, lambda i, attn: replace(attn, scale=attn.scale / (i + 1)))
    return result


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    first = value.layers[0]
    inverse = len(value.layers) > 1 and value.layers[1].attn.scale != first.attn.scale
    return {
        "n_embd": value.d,
        "n_head": first.attn.n_head,
        "n_layer": len(value.layers),
        "n_positions": value.max_pos,
        "n_inner": first.ffn.d_ff,
        "vocab_size": value.vocab,
        "activation_function": first.ffn.act,
        "layer_norm_epsilon": first.norm.eps,
        "scale_attn_weights": first.attn.scale != 1.0,
        "scale_attn_by_inverse_layer_idx": inverse,
        "tie_word_embeddings": value.tie,
    }
