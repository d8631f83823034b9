"""Llama 1 to 3 and all who share its layout (Touvron et al. 2023, arXiv:2302.13971); the readers here serve
the whole line of its descendants."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, RopeScaling, Spec
from caravan.types import UserError

ARCHITECTURE = "LlamaForCausalLM"
CLASSIFIER = "LlamaForSequenceClassification"
ALIASES = ("aquila", "xverse")
CHECKPOINTS = (
    "meta-llama/Llama-1..3", "codellama/*", "lmsys/vicuna-*", "Alpaca", "01-ai/Yi-*", "openlm-research/*",
    "Salesforce/xgen-*", "deepseek-ai/deepseek-llm-*", "deepseek-ai/deepseek-coder-*", "microsoft/Orca-2-*",
    "WizardLM/*", "TigerResearch/tigerbot-2*", "BAAI/Aquila*", "xverse/XVERSE-*",
)  # fmt: skip

RULES = """
table llama @=model.layers.{i} ~=model
prefix? model.
drop rotary_emb
~.{embed_tokens,norm} -> {embed,norm}; lm_head -> head; @.{input,post_attention}_layernorm -> {n1,n2}
@.self_attn.{q,k,v}_proj -> mix.qkv : cat; @.self_attn.{o_proj,q_norm,k_norm} -> mix.{o,qn,kn}
@.mlp.{gate,up}_proj -> ffn.inp : cat; @.mlp.down_proj -> ffn.out
"""

WRITTEN = {"gelu_new": "gelu_pytorch_tanh"}
"""How transformers spells activations that have several names."""
KINDS = {"default": None, "linear": "linear", "dynamic": "dynamic", "ntk": "dynamic", "llama3": "llama3",
         "yarn": "yarn", "longrope": "longrope", "su": "longrope"}  # fmt: skip


def need(config: Mapping[str, Any], key: str) -> Any:
    """A value that has no default. Raises UserError naming the key."""
    return keys.find(config, (key,))[1]


def activation(name: str) -> Any:
    """Our name of an activation. Raises UserError for one we do not have."""
    return keys.activation({"hidden_act": name}, "hidden_act")


# ------------------------------------------------------------------------------------------ rotary embedding


def rope(config: Mapping[str, Any], head_dim: int, share: float = 1.0) -> Rope:
    """Rotary embedding from either generation of keys: rope_parameters (v5), or rope_theta and rope_scaling.

    `share`: part of a head that is rotated when no key says so. Raises UserError naming the key.
    """
    values = {**keys.table(config, "rope_scaling"), **keys.table(config, "rope_parameters")}
    theta = keys.real(values, "rope_theta", default=keys.real(config, "rope_theta", default=10_000.0))
    part = keys.real(
        values,
        "partial_rotary_factor",
        default=keys.real(config, "partial_rotary_factor", default=share),
    )
    dim = int(head_dim * part)
    return keys.even(
        Rope(dim=dim, theta=theta, scaling=rope_scaling(values, config, dim)), "partial_rotary_factor"
    )


def rope_scaling(values: Mapping[str, Any], config: Mapping[str, Any], dim: int) -> RopeScaling | None:
    """What `values` (rope_scaling or rope_parameters) says of the stretch; `config` holds the contexts."""
    kind = keys.word(values, "rope_type", "type", known=KINDS, default="default")
    if kind is None:
        return None
    context = keys.size(config, "max_position_embeddings", default=2048)
    outer = keys.size(config, "original_max_position_embeddings", default=context)
    original = keys.size(values, "original_max_position_embeddings", default=outer)
    if kind == "linear":
        return RopeScaling(kind=kind, factor=_factor(values))
    if kind == "dynamic":
        return RopeScaling(kind=kind, factor=_factor(values), original_context=context)
    if kind == "longrope":
        return RopeScaling(
            kind=kind,
            factor=keys.real(values, "factor", default=context / original),
            original_context=original,
            attention_factor=_optional(values, "attention_factor"),
            short_factor=_divisors(values, "short_factor", dim // 2),
            long_factor=_divisors(values, "long_factor", dim // 2),
        )
    numbers = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_fast", "beta_slow")
    more: dict[str, Any] = {name: value for name in numbers if (value := _optional(values, name)) is not None}
    if kind == "yarn":
        more |= {name: _optional(values, name) for name in ("attention_factor", "mscale", "mscale_all_dim")}
        more["truncate"] = keys.flag(values, "truncate", default=True)
    return RopeScaling(kind=kind, factor=_factor(values), original_context=original, **more)


def _factor(values: Mapping[str, Any]) -> float:
    factor = keys.real(values, "factor")
    if factor <= 0:
        raise keys.wrong("factor", factor, "a positive number")
    return factor


def _divisors(values: Mapping[str, Any], name: str, count: int) -> tuple[float, ...]:
    numbers = keys.find(values, (name,))[1]
    fine = isinstance(numbers, list) and len(numbers) == count
    if not fine or not all(type(x) in (int, float) and x > 0 for x in numbers):
        raise keys.wrong(name, numbers, f"{count} positive numbers")
    return tuple(float(x) for x in numbers)


def _optional(values: Mapping[str, Any], name: str) -> Any:
    return None if values.get(name) is None else keys.real(values, name)


def rope_config(value: Rope | None, head_dim: int | None = None) -> dict[str, Any]:
    """Both spellings of a Rope; nothing without one. With `head_dim` also which part of a head is rotated."""
    if value is None:
        return {}
    scaling = scaling_config(value.scaling)
    part = {} if head_dim is None else {"partial_rotary_factor": keys.share(value.dim, head_dim)}
    return {
        "rope_theta": value.theta,
        "rope_scaling": {**scaling, "type": scaling["rope_type"]} if scaling else None,
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": value.theta, **part},
        **part,
    }


def scaling_config(s: RopeScaling | None) -> dict[str, Any]:
    """The keys of a stretch, {} without one."""
    if s is None:
        return {}
    result: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind in ("llama3", "yarn", "longrope"):
        result["original_max_position_embeddings"] = s.original_context
    if s.kind == "llama3":
        result |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if s.kind == "yarn":
        result |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
    if s.kind == "longrope":
        result |= {"short_factor": list(s.short_factor), "long_factor": list(s.long_factor)}
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        if getattr(s, name) is not None:
            result[name] = getattr(s, name)
    return result


# ------------------------------------------------------------------------------------------ config and Spec


def spec(config: Mapping[str, Any], share: float = 1.0) -> Spec:
    """config.json -> Spec. Raises UserError naming a key that is missing or asks for what we do not have.

    `share`: part of a head that is rotated when no key says so.
    """
    d, heads = keys.size(config, "hidden_size"), keys.size(config, "num_attention_heads")
    groups = keys.groups(config, heads)
    given = config.get("head_dim") is not None
    head_dim = keys.size(config, "head_dim") if given else keys.head_dim(d, heads, "num_attention_heads")
    bias = keys.flag(config, "attention_bias", default=False)
    norm = Norm(kind="rms", eps=keys.real(config, "rms_norm_eps", default=1e-6))
    attn = Attn(
        n_head=heads,
        n_kv=groups,
        head_dim=head_dim,
        qkv_bias=bias,
        o_bias=bias,
        rope=rope(config, head_dim, share),
    )
    ffn = FFN(
        kind="glu",
        d_ff=keys.size(config, "intermediate_size"),
        act=keys.activation(config, "hidden_act", "hidden_activation", default="silu"),
        bias=keys.flag(config, "mlp_bias", default=False),
    )
    layer = Layer(attn=attn, ffn=ffn, norm=norm)
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(layer,) * keys.size(config, "num_hidden_layers"),
        final_norm=norm,
        max_pos=keys.size(config, "max_position_embeddings", default=2048),
        tie=keys.flag(config, "tie_word_embeddings", default=False),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json, for readers of transformers 4 and 5."""
    layer = value.layers[0]
    rope = next((attn.rope for attn in value.attns if attn.rope), None)
    partial = rope is not None and rope.dim != layer.attn.head_dim
    return {
        "hidden_size": value.d,
        "intermediate_size": layer.ffn.d_ff,
        "num_hidden_layers": len(value.layers),
        "num_attention_heads": layer.attn.n_head,
        "num_key_value_heads": layer.attn.n_kv,
        "head_dim": layer.attn.head_dim,
        "hidden_act": WRITTEN.get(layer.ffn.act, layer.ffn.act),
        "rms_norm_eps": layer.norm.eps,
        "max_position_embeddings": value.max_pos,
        "vocab_size": value.vocab,
        "tie_word_embeddings": value.tie,
        "attention_bias": layer.attn.qkv_bias,
        "mlp_bias": layer.ffn.bias,
        **rope_config(rope, layer.attn.head_dim if partial else None),
    }


def with_attention(value: Spec, change: Callable[[int, Attn], Attn]) -> Spec:
    """The same Spec with change(layer index, Attn) -> Attn in every layer."""
    layers = tuple(
        replace(layer, attn=change(i, layer.attn)) if layer.attn else layer
        for i, layer in enumerate(value.layers)
    )
    return replace(value, layers=layers)


def with_rope(value: Spec, **fields: Any) -> Spec:
    """The same Spec with some fields of every Rope changed."""
    return with_attention(
        value, lambda i, attn: replace(attn, rope=replace(attn.rope, **fields)) if attn.rope else attn
    )


def with_layers(value: Spec, **fields: Any) -> Spec:
    """The same Spec with some fields of every Layer changed."""
    return replace(value, layers=tuple(replace(layer, **fields) for layer in value.layers))


def with_norm(value: Spec, norm: Norm) -> Spec:
    """The same Spec with another Norm everywhere."""
    return replace(with_layers(value, norm=norm), final_norm=norm)


def layer_kinds(config: Mapping[str, Any], layers: int, other: Callable[[int], bool]) -> list[bool]:
    """Which layers slide: `layer_types` if given, other(layer index) if not. Raises UserError for a kind of
    layer that neither slides nor is full."""
    kinds = config.get("layer_types")
    if kinds is None:
        return [other(i) for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise keys.wrong("layer_types", kinds, f"a list of {layers} words")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise keys.unsupported("layer_types", kind, ("sliding_attention", "full_attention"))
    return [kind == "sliding_attention" for kind in kinds]


def written_kinds(value: Spec) -> list[str]:
    """`layer_types` of a Spec."""
    return ["sliding_attention" if attn.window else "full_attention" for attn in value.attns]


def window(config: Mapping[str, Any], default: int | None = None) -> int | None:
    """`sliding_window`; absent means `default`, null means none."""
    if "sliding_window" not in config:
        return default
    return None if config["sliding_window"] is None else keys.size(config, "sliding_window")


def inverse(value: float) -> float:
    """The number x nearest to 1 / value with 1 / x == value, so that a quotient survives a round trip."""
    result = 1 / value
    for near in (result, math.nextafter(result, 0.0), math.nextafter(result, math.inf)):
        if 1 / near == value:
            return near
    raise UserError(f"no number is exactly 1 / {value}")
