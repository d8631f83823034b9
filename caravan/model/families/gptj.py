"""GPT-J (Wang and Komatsuzaki 2021): attention and MLP side by side behind one norm, rotary pairs that are
neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, Spec

ARCHITECTURE = "GPTJForCausalLM"
CLASSIFIER = "GPTJForSequenceClassification"
CHECKPOINTS = ("EleutherAI/gpt-j-6b", "databricks/dolly-v1-6b", "nomic-ai/gpt4all-j")

RULES = r"""
table @=transformer.h.{i} ~=transformer
prefix? transformer.
drop \.attn\.bias$ \.attn\.masked_bias$ \.attn\.causal_mask$ embed_positions$
~.{wte,ln_f} -> {embed,norm}; lm_head -> head; @.ln_1 -> n1; @.mlp.{fc_in,fc_out} -> ffn.{inp,out}
@.attn.{q,k,v}_proj -> mix.qkv : cat rope; @.attn.out_proj -> mix.o
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    d, heads = keys.size(config, "n_embd", "hidden_size"), keys.size(config, "n_head", "num_attention_heads")
    width = keys.head_dim(d, heads, "n_head")
    rope = Rope(dim=keys.size(config, "rotary_dim", default=64), interleaved=True, fp32=True)
    if rope.dim > width or rope.dim % 2:
        raise keys.wrong("rotary_dim", rope.dim, f"an even number up to the head width {width}")
    norm = Norm(kind="layer", eps=keys.positive(config, "layer_norm_epsilon", default=1e-5), bias=True)
    act = keys.activation(config, "activation_function", default="gelu_new")
    layer = Layer(
        attn=Attn(n_head=heads, n_kv=heads, head_dim=width, rope=rope),
        ffn=FFN(kind="mlp", d_ff=keys.size(config, "n_inner", default=4 * d), act=act, bias=True),
        norm=norm,
        parallel=True,
        shared_norm=True,
    )
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(layer,) * keys.size(config, "n_layer", "num_hidden_layers"),
        final_norm=norm,
        max_pos=keys.size(config, "n_positions", "max_position_embeddings", default=2048),
        tie=keys.untied(config),
        head_bias=True,
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
        "rotary_dim": first.attn.rope.dim,
        "vocab_size": value.vocab,
        "activation_function": first.ffn.act,
        "layer_norm_epsilon": first.norm.eps,
        "tie_word_embeddings": value.tie,
    }
