"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745): parallel residual with two norms, rotation of a share of
each head, queries, keys and values interleaved head by head on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.families import llama
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, Spec

ARCHITECTURE = "GPTNeoXForCausalLM"
CLASSIFIER = "GPTNeoXForSequenceClassification"
CHECKPOINTS = (
    "EleutherAI/gpt-neox-20b", "EleutherAI/pythia-*", "databricks/dolly-v2-*",
    "togethercomputer/RedPajama-INCITE-*", "stabilityai/stablelm-base-alpha-*",
    "OpenAssistant/oasst-sft-*-pythia-12b", "cyberagent/open-calm-*",
)  # fmt: skip

RULES = r"""
table @=gpt_neox.layers.{i} ~=gpt_neox
prefix? gpt_neox.
drop rotary_emb \.attention\.bias$ \.attention\.masked_bias$
~.{embed_in,final_layer_norm} -> {embed,norm}; embed_out -> head
@.{input,post_attention}_layernorm -> {n1,n2}
@.attention.query_key_value -> mix.qkv : grp; @.attention.dense -> mix.o
@.mlp.dense_{h_to_4h,4h_to_h} -> ffn.{inp,out}
"""


def rope(
    config: Mapping[str, Any],
    width: int,
    *,
    theta: tuple[str, ...] = (),
    share: tuple[str, ...] = (),
    whole: float = 1.0,
) -> Rope:
    """Rotary embedding of a head `width` wide, from either generation of keys.

    `theta` and `share` are the family's older spellings; `whole` is the share when no key says it. Raises
    UserError naming the key.
    """
    values = {**keys.table(config, "rope_scaling"), **keys.table(config, "rope_parameters")}
    said = {**config, **values}
    turned = keys.real(said, "partial_rotary_factor", *share, default=whole)
    name, _ = keys.find(said, ("partial_rotary_factor", *share), whole)
    if not 0 < turned <= 1:
        raise keys.wrong(name, turned, "a share of the head, above 0 and up to 1")
    keys.even(Rope(dim=int(width * turned)), name)
    values["partial_rotary_factor"] = turned
    values["rope_theta"] = keys.positive(said, "rope_theta", *theta, default=10_000.0)
    return llama.rope({**config, "rope_parameters": values}, width)


def equal_layers(
    config: Mapping[str, Any],
    norm: Norm,
    ffn: FFN,
    *,
    share: tuple[str, ...] = (),
    whole: float,
    context: int,
    **attn: Any,
) -> Spec:
    """Phi, Persimmon and StableLM, under the keys they share: equal layers, a share of each head rotated (as
    `rope` reads it). `context`: the positions when no key says it; `attn`: further knobs of Attn.

    Raises UserError naming the key.
    """
    d, heads = keys.size(config, "hidden_size"), keys.size(config, "num_attention_heads")
    width = keys.head_dim(d, heads, "num_attention_heads")
    turned = rope(config, width, share=share, whole=whole)
    mixer = Attn(n_head=heads, n_kv=keys.groups(config, heads), head_dim=width, rope=turned, **attn)
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(Layer(attn=mixer, ffn=ffn, norm=norm),) * keys.size(config, "num_hidden_layers"),
        final_norm=norm,
        max_pos=keys.size(config, "max_position_embeddings", default=context),
        tie=keys.flag(config, "tie_word_embeddings", default=False),
    )


def equal_config(value: Spec) -> dict[str, Any]:
    """The keys of `equal_layers`."""
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
        "qk_layernorm": first.attn.qk_norm is not None,
        "tie_word_embeddings": value.tie,
        **llama.rope_config(first.attn.rope, first.attn.head_dim),
    }


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    d, heads = keys.size(config, "hidden_size"), keys.size(config, "num_attention_heads")
    width = keys.head_dim(d, heads, "num_attention_heads")
    bias = keys.flag(config, "attention_bias", default=True)
    norm = Norm(kind="layer", eps=keys.positive(config, "layer_norm_eps", default=1e-5), bias=True)
    attn = Attn(
        n_head=heads,
        n_kv=heads,
        head_dim=width,
        qkv_bias=bias,
        o_bias=bias,
        rope=rope(config, width, theta=("rotary_emb_base",), share=("rotary_pct",), whole=0.25),
    )
    act = keys.activation(config, "hidden_act", default="gelu")
    layer = Layer(
        attn=attn,
        ffn=FFN(kind="mlp", d_ff=keys.size(config, "intermediate_size"), act=act, bias=True),
        norm=norm,
        parallel=keys.flag(config, "use_parallel_residual", default=True),
    )
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(layer,) * keys.size(config, "num_hidden_layers"),
        final_norm=norm,
        max_pos=keys.size(config, "max_position_embeddings", default=2048),
        tie=keys.flag(config, "tie_word_embeddings", default=False),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    first = value.layers[0]
    turned = llama.rope_config(first.attn.rope, first.attn.head_dim)
    return {
        "hidden_size": value.d,
        "num_attention_heads": first.attn.n_head,
        "num_hidden_layers": len(value.layers),
        "intermediate_size": first.ffn.d_ff,
        "max_position_embeddings": value.max_pos,
        "vocab_size": value.vocab,
        "hidden_act": first.ffn.act,
        "layer_norm_eps": first.norm.eps,
        "attention_bias": first.attn.qkv_bias,
        "use_parallel_residual": first.parallel,
        "tie_word_embeddings": value.tie,
        "rotary_emb_base": turned["rope_theta"],
        "rotary_pct": turned["partial_rotary_factor"],
        **turned,
    }
