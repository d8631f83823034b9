"""StableLM 3B and 2 (Bellagente et al. 2024, arXiv:2402.17834): Llama with layer norms and a quarter of each
head rotated; the 12B runs its sublayers side by side and gives every query and key head its own gain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.families import gpt_neox, llama
from caravan.model.spec import FFN, Attn, Layer, Norm, Spec

ARCHITECTURE = "StableLmForCausalLM"
CLASSIFIER = "StableLmForSequenceClassification"
ALIASES = ("stablelm_epoch",)
CHECKPOINTS = ("stabilityai/stablelm-3b-4e1t", "stabilityai/stablelm-2-1_6b", "stabilityai/stablelm-2-12b")

RULES = """
table @=model.layers.{i} ~=model
prefix? model.
drop rotary_emb
~.{embed_tokens,norm} -> {embed,norm}; lm_head -> head; @.{input,post_attention}_layernorm -> {n1,n2}
@.self_attn.{q,k,v}_proj -> mix.qkv : cat; @.self_attn.o_proj -> mix.o
@.self_attn.{q,k}_layernorm.norms.{h} -> mix.{qn,kn}
@.mlp.{gate,up}_proj -> ffn.inp : cat; @.mlp.down_proj -> ffn.out
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec; the first releases (model_type stablelm_epoch) spell norm_eps and rope_pct.

    Raises UserError naming the key.
    """
    d, heads = keys.size(config, "hidden_size"), keys.size(config, "num_attention_heads")
    groups = keys.size(config, "num_key_value_heads", default=heads)
    if heads % groups:
        raise keys.wrong("num_key_value_heads", groups, f"a divisor of the {heads} query heads")
    width = keys.head_dim(d, heads, "num_attention_heads")
    eps = keys.positive(config, "layer_norm_eps", "norm_eps", default=1e-5)
    norm = Norm(kind="layer", eps=eps, bias=True)
    attn = Attn(
        n_head=heads,
        n_kv=groups,
        head_dim=width,
        qkv_bias=keys.flag(config, "use_qkv_bias", default=False),
        rope=gpt_neox.rope(config, width, share=("rope_pct",), whole=0.25),
        qk_norm=Norm(kind="layer", eps=eps) if keys.flag(config, "qk_layernorm", default=False) else None,
        qk_norm_over="per_head",
    )
    act = keys.activation(config, "hidden_act", default="silu")
    parallel = keys.flag(config, "use_parallel_residual", default=False)
    layer = Layer(
        attn=attn,
        ffn=FFN(kind="glu", d_ff=keys.size(config, "intermediate_size"), act=act),
        norm=norm,
        parallel=parallel,
        shared_norm=parallel,
    )
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(layer,) * keys.size(config, "num_hidden_layers"),
        final_norm=norm,
        max_pos=keys.size(config, "max_position_embeddings", default=4096),
        tie=keys.flag(config, "tie_word_embeddings", default=False),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    first = value.layers[0]
    return {
        "hidden_size": value.d,
        "num_attention_heads": first.attn.n_head,
        "num_key_value_heads": first.attn.n_kv,
        "num_hidden_layers": len(value.layers),
        "intermediate_size": first.ffn.d_ff,
        "max_position_embeddings": value.max_pos,
        "vocab_size": value.vocab,
        "hidden_act": first.ffn.act,
        "layer_norm_eps": first.norm.eps,
        "use_qkv_bias": first.attn.qkv_bias,
        "qk_layernorm": first.attn.qk_norm is not None,
        "use_parallel_residual": first.parallel,
        "tie_word_embeddings": value.tie,
        **llama.rope_config(first.attn.rope, first.attn.head_dim),
    }
