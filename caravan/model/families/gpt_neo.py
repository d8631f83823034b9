"""GPT-Neo (Black et al. 2021): GPT-2 whose layers alternate global and local attention, without 1/sqrt(d)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.spec import FFN, Attn, Layer, Norm, Spec

ARCHITECTURE = "GPTNeoForCausalLM"
CLASSIFIER = "GPTNeoForSequenceClassification"
CHECKPOINTS = ("EleutherAI/gpt-neo-125m", "EleutherAI/gpt-neo-1.3B", "EleutherAI/gpt-neo-2.7B")

RULES = r"""
table @=transformer.h.{i} ~=transformer
prefix? transformer.
drop \.attention\.bias$ \.attention\.masked_bias$
~.{wte,wpe,ln_f} -> {embed,pos,norm}; @.{ln_1,ln_2} -> {n1,n2}; lm_head -> head
@.attn.attention.{q,k,v}_proj -> mix.qkv : cat; @.attn.attention.out_proj -> mix.o
@.mlp.{c_fc,c_proj} -> ffn.{inp,out}
"""


def kinds(config: Mapping[str, Any], count: int) -> list[bool]:
    """For each layer, is it local? From `attention_layers`, else from the pattern in `attention_types`."""
    key = "attention_layers" if config.get("attention_layers") is not None else "attention_types"
    value = config.get(key)
    if value is None:
        value = [[["global", "local"], 12]]
    known = {"global": False, "local": True}
    try:
        if key == "attention_types":  # a repeat beyond the layers there are is not worth writing out
            value = [kind for pattern, repeat in value for kind in list(pattern) * min(repeat, count + 1)]
        result = [known[kind] for kind in value]
    except (TypeError, ValueError, KeyError):
        raise keys.wrong(key, value, "'global' and 'local' in patterns") from None
    if len(result) != count:
        raise keys.wrong(key, value, f"{count} layers, as 'num_layers' says, got {len(result)}")
    return result


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    d = keys.size(config, "hidden_size")
    heads = keys.size(config, "num_heads", "num_attention_heads")
    count = keys.size(config, "num_layers", "num_hidden_layers")
    window = keys.size(config, "window_size", default=256)
    width = keys.head_dim(d, heads, "num_heads")
    norm = Norm(kind="layer", eps=keys.positive(config, "layer_norm_epsilon", default=1e-5), bias=True)
    act = keys.activation(config, "activation_function", default="gelu_new")
    ffn = FFN(kind="mlp", d_ff=keys.size(config, "intermediate_size", default=4 * d), act=act, bias=True)

    def layer(local: bool) -> Layer:
        attn = Attn(
            n_head=heads,
            n_kv=heads,
            head_dim=width,
            o_bias=True,
            scale=1.0,
            window=window if local else None,
        )
        return Layer(attn=attn, ffn=ffn, norm=norm)

    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=tuple(layer(local) for local in kinds(config, count)),
        final_norm=norm,
        max_pos=keys.size(config, "max_position_embeddings", default=2048),
        pos="learned",
        tie=keys.flag(config, "tie_word_embeddings", default=True),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    first = value.layers[0]
    windows = [layer.attn.window for layer in value.layers]
    names = ["local" if window else "global" for window in windows]
    return {
        "hidden_size": value.d,
        "num_heads": first.attn.n_head,
        "num_layers": len(value.layers),
        "max_position_embeddings": value.max_pos,
        "intermediate_size": first.ffn.d_ff,
        "vocab_size": value.vocab,
        "activation_function": first.ffn.act,
        "layer_norm_epsilon": first.norm.eps,
        "window_size": next((window for window in windows if window), 256),
        "attention_layers": names,
        "attention_types": [[[name], 1] for name in names],
        "tie_word_embeddings": value.tie,
    }
