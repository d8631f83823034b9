"""Llama 1 to 3 and all who share its layout (Touvron et al. 2023, arXiv:2302.13971)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, RopeScaling, Spec
from caravan.types import UserError

ARCHITECTURE = "LlamaForCausalLM"
CLASSIFIER = "LlamaForSequenceClassification"

RULES = """
table @=model.layers.{i} ~=model
drop rotary_emb
~.{embed_tokens,norm} -> {embed,norm}; lm_head -> head; @.{input,post_attention}_layernorm -> {n1,n2}
@.self_attn.{q,k,v}_proj -> mix.qkv : cat; @.self_attn.{o_proj,q_norm,k_norm} -> mix.{o,qn,kn}
@.mlp.{gate,up}_proj -> ffn.inp : cat; @.mlp.down_proj -> ffn.out
"""

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_new",
               "gelu_pytorch_tanh": "gelu_new", "relu": "relu"}  # fmt: skip


def need(config: Mapping[str, Any], key: str) -> Any:
    """A value that has no default. Raises UserError naming the key."""
    if config.get(key) is None:
        raise UserError(f"config.json has no '{key}'", "is this the config.json of a Hugging Face model?")
    return config[key]


def activation(name: str) -> Any:
    """Our name of an activation. Raises UserError for one we do not have."""
    if name not in ACTIVATIONS:
        raise UserError(
            f"config.json: activation '{name}' is not supported", f"known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    """Rotary embedding from either generation of keys: rope_parameters (v5), or rope_theta and
    rope_scaling."""
    values = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    theta = float(values.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    share = values.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    kind = values.get("rope_type") or values.get("type") or "default"
    scaling: RopeScaling | None = None
    if kind in ("linear", "llama3", "yarn"):
        optional = {
            key: values[key]
            for key in (
                "low_freq_factor",
                "high_freq_factor",
                "beta_fast",
                "beta_slow",
                "attention_factor",
                "truncate",
            )
            if values.get(key) is not None
        }
        original = (
            values.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 0
        )
        if kind == "yarn" and values.get("mscale") is not None:
            raise UserError("config.json: yarn scaling with 'mscale' is not supported")
        scaling = RopeScaling(
            kind=kind,  # type: ignore[arg-type]
            factor=float(need(values, "factor")),
            original_context=original,
            **optional,
        )
    elif kind != "default":
        raise UserError(
            f"config.json: rope type '{kind}' is not supported", "known: default, linear, llama3, yarn"
        )
    return Rope(dim=int(head_dim * share), theta=theta, scaling=scaling)


def rope_config(value: Rope | None) -> dict[str, Any]:
    """Both spellings of a Rope; nothing without one."""
    if value is None:
        return {}
    scaling: dict[str, Any] = {}
    if value.scaling is not None:
        s = value.scaling
        scaling = {"rope_type": s.kind, "factor": s.factor}
        if s.kind != "linear":
            scaling["original_max_position_embeddings"] = s.original_context
        if s.kind == "llama3":
            scaling |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
        if s.kind == "yarn":
            scaling |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
            if s.attention_factor is not None:
                scaling["attention_factor"] = s.attention_factor
    return {
        "rope_theta": value.theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": value.theta},
    }


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming a key that is missing or asks for what we do not have."""
    d, heads = need(config, "hidden_size"), need(config, "num_attention_heads")
    head_dim = config.get("head_dim") or d // heads
    bias = bool(config.get("attention_bias", False))
    norm = Norm(kind="rms", eps=float(config.get("rms_norm_eps", 1e-6)))
    attn = Attn(
        n_head=heads,
        n_kv=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        qkv_bias=bias,
        o_bias=bias,
        rope=rope(config, head_dim),
    )
    ffn = FFN(
        kind="glu",
        d_ff=need(config, "intermediate_size"),
        act=activation(config.get("hidden_act", "silu")),
        bias=bool(config.get("mlp_bias", False)),
    )
    layer = Layer(attn=attn, ffn=ffn, norm=norm)
    return Spec(
        vocab=need(config, "vocab_size"),
        d=d,
        layers=(layer,) * need(config, "num_hidden_layers"),
        final_norm=norm,
        max_pos=int(config.get("max_position_embeddings") or 2048),
        tie=bool(config.get("tie_word_embeddings", False)),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json, for readers of transformers 4 and 5."""
    layer = value.layers[0]
    return {
        "hidden_size": value.d,
        "intermediate_size": layer.ffn.d_ff,
        "num_hidden_layers": len(value.layers),
        "num_attention_heads": layer.attn.n_head,
        "num_key_value_heads": layer.attn.n_kv,
        "head_dim": layer.attn.head_dim,
        "hidden_act": "gelu_pytorch_tanh" if layer.ffn.act == "gelu_new" else layer.ffn.act,
        "rms_norm_eps": layer.norm.eps,
        "max_position_embeddings": value.max_pos,
        "vocab_size": value.vocab,
        "tie_word_embeddings": value.tie,
        "attention_bias": layer.attn.qkv_bias,
        "mlp_bias": layer.ffn.bias,
        **rope_config(layer.attn.rope),
    }


def with_attention(value: Spec, change: Any) -> Spec:
    """The same Spec with change(layer index, Attn) -> Attn in every layer."""
    layers = tuple(replace(layer, attn=change(i, layer.attn)) for i, layer in enumerate(value.layers))
    return replace(value, layers=layers)
