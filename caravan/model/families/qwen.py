"""Qwen 1 (Bai et al. 2023, arXiv:2309.16609): Llama in the layout of GPT-2, with biases on q, k and v,
rotation in fp32, and the FFN's gate under the name w2.

Beyond `seq_length` the rotary base is stretched in powers of two (`use_dynamic_ntk`) and queries grow with
the logarithm of their position (`use_logn_attn`), up to `max_position_embeddings`. The original does neither
in training, and keeps the base its prompt had while it generates; here both follow the length of the text, so
that what is trained is what is served, and a text that crosses a power of two is read again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, RopeScaling, Spec

ARCHITECTURE = "QWenLMHeadModel"
CLASSIFIER = None
CHECKPOINTS = ("Qwen/Qwen-1_8B*", "Qwen/Qwen-7B*", "Qwen/Qwen-14B*", "Qwen/Qwen-72B*")
RULES = """
table qwen @=transformer.h.{i} ~=transformer
drop rotary
~.{wte,ln_f} -> {embed,norm}; lm_head -> head; @.{ln_1,ln_2} -> {n1,n2}
@.attn.{c_attn,c_proj} -> mix.{qkv,o}; @.mlp.{w2,w1} -> ffn.inp : cat; @.mlp.c_proj -> ffn.out
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec; `intermediate_size` counts gate and up. Raises UserError naming the key."""
    keys.refuse(config, "no_bias", True)
    d, heads = keys.size(config, "hidden_size"), keys.size(config, "num_attention_heads")
    width = keys.size(config, "kv_channels", default=d // heads)
    both = keys.size(config, "intermediate_size")
    if both % 2:
        raise keys.wrong("intermediate_size", both, "an even number: gate and up together")
    norm = Norm(eps=keys.real(config, "layer_norm_epsilon", default=1e-6))
    trained = keys.size(config, "seq_length", default=2048)
    rope = _rope(config, width, trained)
    attn = Attn(n_head=heads, n_kv=heads, head_dim=width, qkv_bias=True, rope=rope)
    layer = Layer(attn=attn, ffn=FFN(kind="glu", d_ff=both // 2, act="silu"), norm=norm)
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(layer,) * keys.size(config, "num_hidden_layers"),
        final_norm=norm,
        max_pos=_context(config, trained) if rope.scaling or rope.log_from else trained,
        tie=keys.flag(config, "tie_word_embeddings", default=False),
    )


def _context(config: Mapping[str, Any], trained: int) -> int:
    return keys.size(config, "max_position_embeddings", default=trained)


def _rope(config: Mapping[str, Any], width: int, trained: int) -> Rope:
    """The rotation of a head `width` wide, stretched only where texts may be longer than `trained`."""
    share = keys.real(config, "rotary_pct", default=1.0)
    rope = Rope(dim=int(width * share), theta=keys.real(config, "rotary_emb_base", default=1e4), fp32=True)
    stretched = keys.flag(config, "use_dynamic_ntk", default=True)
    grown = keys.flag(config, "use_logn_attn", default=True)
    if _context(config, trained) > trained:
        scaling = RopeScaling(kind="powers", original_context=trained) if stretched else None
        rope = replace(rope, scaling=scaling, log_from=trained if grown else None)
    return keys.even(rope, "rotary_pct")


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    layer = value.layers[0]
    attn, rope = layer.attn, layer.attn.rope
    trained = rope.switch or rope.log_from
    longer = {
        "max_position_embeddings": value.max_pos,
        "use_dynamic_ntk": rope.scaling is not None,
        "use_logn_attn": rope.log_from is not None,
    }
    return {
        **(longer if trained else {}),
        "hidden_size": value.d,
        "num_attention_heads": attn.n_head,
        "kv_channels": attn.head_dim,
        "intermediate_size": 2 * layer.ffn.d_ff,
        "layer_norm_epsilon": layer.norm.eps,
        "rotary_pct": keys.share(rope.dim, attn.head_dim),
        "rotary_emb_base": rope.theta,
        "vocab_size": value.vocab,
        "num_hidden_layers": len(value.layers),
        "seq_length": trained or value.max_pos,
        "tie_word_embeddings": value.tie,
        "no_bias": True,
    }
