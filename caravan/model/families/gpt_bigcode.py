"""GPT-BigCode (Li et al. 2023, arXiv:2305.06161): GPT-2 with one key/value head for all queries, weights
stored [out, in]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.spec import FFN, Attn, Layer, Norm, Spec

ARCHITECTURE = "GPTBigCodeForCausalLM"
CLASSIFIER = "GPTBigCodeForSequenceClassification"
CHECKPOINTS = (
    "bigcode/starcoder",
    "bigcode/starcoderbase*",
    "bigcode/gpt_bigcode-santacoder",
    "bigcode/tiny_starcoder_py",
)

# without multi_query the rows of c_attn go head by head, with it there is one group: the same rule
RULES = r"""
table @=transformer.h.{i} ~=transformer
prefix? transformer.
drop \.attn\.bias$ \.attn\.masked_bias$
~.{wte,wpe,ln_f} -> {embed,pos,norm}; @.{ln_1,ln_2} -> {n1,n2}; lm_head -> head
@.attn.c_attn -> mix.qkv : grp; @.attn.c_proj -> mix.o; @.mlp.{c_fc,c_proj} -> ffn.{inp,out}
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    d, heads = keys.size(config, "n_embd", "hidden_size"), keys.size(config, "n_head", "num_attention_heads")
    keys.refuse(config, "add_cross_attention", False)
    width = keys.head_dim(d, heads, "n_head")
    norm = Norm(kind="layer", eps=keys.positive(config, "layer_norm_epsilon", default=1e-5), bias=True)
    attn = Attn(
        n_head=heads,
        n_kv=1 if keys.flag(config, "multi_query", default=True) else heads,
        head_dim=width,
        qkv_bias=True,
        o_bias=True,
        scale=width**-0.5 if keys.flag(config, "scale_attn_weights", default=True) else 1.0,
    )
    act = keys.activation(config, "activation_function", default="gelu_pytorch_tanh")
    ffn = FFN(kind="mlp", d_ff=keys.size(config, "n_inner", default=4 * d), act=act, bias=True)
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(Layer(attn=attn, ffn=ffn, norm=norm),) * keys.size(config, "n_layer", "num_hidden_layers"),
        final_norm=norm,
        max_pos=keys.size(config, "n_positions", "max_position_embeddings", default=1024),
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
        "n_inner": first.ffn.d_ff,
        "vocab_size": value.vocab,
        "activation_function": "gelu_pytorch_tanh" if first.ffn.act == "gelu_new" else first.ffn.act,
        "layer_norm_epsilon": first.norm.eps,
        "multi_query": first.attn.n_kv == 1,
        "scale_attn_weights": first.attn.scale != 1.0,
        "tie_word_embeddings": value.tie,
    }
