"""RWKV-7 "Goose" (Peng et al. 2025, arXiv:2503.14456): a matrix state corrected by the delta rule.

Files come in two layouts: the author's names (`blocks.0.att.w1`, low-rank maps [in, out]), and those of
flash-linear-attention (`model.layers.0.attn.w_lora.lora.0.weight`, [out, in]), whose config.json names that
class under `architectures`. We note the layout under `layout` when we write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.families.rwkv5 import FINAL_EPS, guards, native
from caravan.model.mixers import knobs
from caravan.model.spec import FFN, Layer, Norm, Spec

__all__ = ["guards"]

ARCHITECTURE = "RWKV7ForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("fla-hub/rwkv7-*", "BlinkDL/rwkv-7-world")

RULES = """
table native @=blocks.{i}
[native] {emb,ln_out,head,blocks.0.ln0} -> {embed,norm,head,embed_norm}
[native] @.{ln1,ln2} -> {n1,n2}; [native] @.att.x_{r,w,k,v,a,g} -> mix.mix_{r,w,k,v,a,g} : sq
[native] @.att.{w0,a0,v0,k_k,k_a} -> mix.{w0,a0,v0,k_k,k_a} : sq; [native] @.att.r_k -> mix.r_k
[native] @.att.{w1,w2,a1,a2,v1,v2,g1,g2} -> mix.{w1,w2,a1,a2,v1,v2,g1,g2}
[native] @.att.{receptance,key,value,output,ln_x} -> mix.{r,k,v,o,ln}
[native] @.ffn.x_k -> ffn.mix_k : sq; [native] @.ffn.{key,value} -> ffn.{k,v}
table port @=model.layers.{i} ~=model
[not native] ~.{embeddings,norm,layers.0.pre_norm} -> {embed,norm,embed_norm}; [not native] lm_head -> head
[not native] @.{attn_norm,ffn_norm} -> {n1,n2}
[not native] @.attn.x_{r,w,k,v,a,g} -> mix.mix_{r,w,k,v,a,g} : sq
[not native] @.attn.{w,a,v}_lora.lora.2.bias -> mix.{w0,a0,v0}
[not native] @.attn.{k_k,k_a,r_k} -> mix.{k_k,k_a,r_k}
[not native] @.attn.{w,a,v,g}_lora.lora.0.weight -> mix.{w1,a1,v1,g1} : T
[not native] @.attn.{w,a,v,g}_lora.lora.2.weight -> mix.{w2,a2,v2,g2} : T
[not native] @.attn.{r_proj,k_proj,v_proj,o_proj,g_norm} -> mix.{r,k,v,o,ln}
[not native] @.ffn.x_k -> ffn.mix_k; [not native] @.ffn.{key,value} -> ffn.{k,v}
"""

KEPT = r"^blocks\.0\.att\.v[012]$"
"""Some of the author's files give the first layer a value mix, too, which nothing reads."""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    keys.refuse(config, "attn")
    keys.refuse(config, "value_dim", _widths(config))
    keys.refuse(config, "norm_first", True)
    keys.refuse(config, "norm_bias", True)
    keys.refuse(config, "hidden_act", "sqrelu", "relu2")
    d, head_dim = keys.size(config, "hidden_size"), keys.size(config, "head_dim", default=64)
    eps = keys.real(config, "norm_eps", default=FINAL_EPS)
    norm = Norm(kind="layer", eps=eps, bias=True)
    if d % head_dim:
        raise keys.wrong("head_dim", head_dim, f"a divisor of the width {d}")
    ssm = knobs.Rwkv7(
        n_head=d // head_dim,
        head_dim=head_dim,
        decay_rank=keys.size(config, "decay_low_rank_dim"),
        rate_rank=keys.size(config, "a_low_rank_dim"),
        value_rank=keys.size(config, "v_low_rank_dim"),
        gate_rank=keys.size(config, "gate_low_rank_dim"),
        eps=head_dim * eps,
        native=native(config, ARCHITECTURE),
    )
    width = -(-int(d * keys.real(config, "hidden_ratio", default=4.0)) // 32) * 32
    ffn = FFN(kind="rwkv7", d_ff=keys.size(config, "intermediate_size", default=width), act="relu2")
    count = keys.size(config, "num_hidden_layers")
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(Layer(mixer="rwkv7", ssm=ssm, ffn=ffn, norm=norm),) * count,
        final_norm=norm,
        embed_norm=norm,
        max_pos=keys.size(config, "max_position_embeddings", default=4096),
        tie=keys.flag(config, "tie_word_embeddings", default=False),
    )


def _widths(config: Mapping[str, Any]) -> list[int]:
    """The only `value_dim` we know: the width, in every layer."""
    return [keys.size(config, "hidden_size")] * keys.size(config, "num_hidden_layers")


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    first = value.layers[0]
    ssm = first.ssm
    assert first.ffn is not None
    return {
        "vocab_size": value.vocab,
        "hidden_size": value.d,
        "num_hidden_layers": len(value.layers),
        "head_dim": ssm.head_dim,
        "decay_low_rank_dim": ssm.decay_rank,
        "a_low_rank_dim": ssm.rate_rank,
        "v_low_rank_dim": ssm.value_rank,
        "gate_low_rank_dim": ssm.gate_rank,
        "intermediate_size": first.ffn.d_ff,
        "hidden_act": "sqrelu",
        "norm_eps": first.norm.eps,
        "max_position_embeddings": value.max_pos,
        "tie_word_embeddings": value.tie,
        "layout": "native" if ssm.native else "port",
    }
