"""Qwen 1 (Bai et al. 2023, arXiv:2309.16609): Llama in the layout of GPT-2, with biases on q, k and v,
rotation in fp32, and the FFN's gate under the name w2.

Beyond `seq_length` the original stretches its rotary base and scales queries by the logarithm of their
position; that is left out, and the context ends there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, Spec

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
    share = keys.real(config, "rotary_pct", default=1.0)
    rope = Rope(dim=int(width * share), theta=keys.real(config, "rotary_emb_base", default=1e4), fp32=True)
    attn = Attn(n_head=heads, n_kv=heads, head_dim=width, qkv_bias=True, rope=keys.even(rope, "rotary_pct"))
    layer = Layer(attn=attn, ffn=FFN(kind="glu", d_ff=both // 2, act="silu"), norm=norm)
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(layer,) * keys.size(config, "num_hidden_layers"),
        final_norm=norm,
        max_pos=keys.size(config, "seq_length", default=2048),
        tie=keys.flag(config, "tie_word_embeddings", default=False),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    layer = value.layers[0]
    attn = layer.attn
    return {
        "hidden_size": value.d,
        "num_attention_heads": attn.n_head,
        "kv_channels": attn.head_dim,
        "intermediate_size": 2 * layer.ffn.d_ff,
        "layer_norm_epsilon": layer.norm.eps,
        "rotary_pct": keys.share(attn.rope.dim, attn.head_dim),
        "rotary_emb_base": attn.rope.theta,
        "vocab_size": value.vocab,
        "num_hidden_layers": len(value.layers),
        "seq_length": value.max_pos,
        "tie_word_embeddings": value.tie,
        "no_bias": True,
    }
