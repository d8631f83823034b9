"""OPT (Zhang et al. 2022, arXiv:2205.01068): learned positions counted from 2; the 350m puts its norms after
the sum and works with an embedding narrower than the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.spec import FFN, Attn, Layer, Norm, Spec

ARCHITECTURE = "OPTForCausalLM"
CLASSIFIER = "OPTForSequenceClassification"
CHECKPOINTS = ("facebook/opt-*", "facebook/opt-iml-*", "facebook/galactica-*", "KoboldAI/OPT-*")
OFFSET = 2
"""Rows 0 and 1 of the position table are never read: fairseq counted from the padding id."""

RULES = """
table @=model.decoder.layers.{i} ~=model.decoder
prefix? model.
~.{embed_tokens,embed_positions,project_in,project_out,final_layer_norm} -> {embed,pos,pin,pout,norm}
lm_head -> head; [pre] @.{self_attn_layer_norm,final_layer_norm} -> {n1,n2}
[sum] @.{self_attn_layer_norm,final_layer_norm} -> {p1,p2}
@.self_attn.{q,k,v}_proj -> mix.qkv : cat; @.self_attn.out_proj -> mix.o; @.{fc1,fc2} -> ffn.{inp,out}
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    d, heads = keys.size(config, "hidden_size"), keys.size(config, "num_attention_heads")
    narrow = keys.size(config, "word_embed_proj_dim", default=d)
    bias = keys.flag(config, "enable_bias", default=True)
    affine = keys.flag(config, "layer_norm_elementwise_affine", default=True)
    before = keys.flag(config, "do_layer_norm_before", default=True)
    final = before and not keys.flag(config, "_remove_final_layer_norm", default=False)
    norm = Norm(kind="layer", eps=1e-5, bias=affine, affine=affine)
    act = keys.activation(config, "activation_function", default="relu")
    width = keys.head_dim(d, heads, "num_attention_heads")
    layer = Layer(
        attn=Attn(n_head=heads, n_kv=heads, head_dim=width, qkv_bias=bias, o_bias=bias),
        ffn=FFN(kind="mlp", d_ff=keys.size(config, "ffn_dim"), act=act, bias=bias),
        norm=norm,
        pre=before,
        post="none" if before else "sum",
    )
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(layer,) * keys.size(config, "num_hidden_layers"),
        final_norm=norm if final else None,
        max_pos=keys.size(config, "max_position_embeddings", default=2048),
        pos="learned",
        pos_offset=OFFSET,
        embed_dim=None if narrow == d else narrow,
        tie=keys.flag(config, "tie_word_embeddings", default=True),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    first = value.layers[0]
    return {
        "hidden_size": value.d,
        "num_attention_heads": first.attn.n_head,
        "num_hidden_layers": len(value.layers),
        "ffn_dim": first.ffn.d_ff,
        "max_position_embeddings": value.max_pos,
        "vocab_size": value.vocab,
        "word_embed_proj_dim": value.embed_dim or value.d,
        "activation_function": first.ffn.act,
        "do_layer_norm_before": first.pre,
        "_remove_final_layer_norm": first.pre and value.final_norm is None,
        "enable_bias": first.ffn.bias,
        "layer_norm_elementwise_affine": first.norm.affine,
        "tie_word_embeddings": value.tie,
    }
