"""RWKV-5 "Eagle" (Peng et al. 2024, arXiv:2404.05892): a matrix state per head, with a gate.

Files come in two layouts: the author's names (`blocks.0.att.key`), and those of the port to transformers
(`rwkv.blocks.0.attention.key`), whose config.json names the port's class under `architectures`. We note the
layout under `layout` when we write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families.mamba import UNBOUNDED
from caravan.model.mixers import knobs
from caravan.model.spec import FFN, Layer, Norm, Spec

ARCHITECTURE = "Rwkv5ForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("RWKV/rwkv-5-world-*", "RWKV/v5-Eagle-7B-HF")

RULES = """
table native @=blocks.{i}
[native] {emb,ln_out,head,blocks.0.ln0} -> {embed,norm,head,embed_norm}
[native] @.{ln1,ln2} -> {n1,n2}; [native] @.att.time_{decay,faaaa} -> mix.{decay,first}
[native] @.att.time_mix_{k,v,r,g} -> mix.mix_{k,v,r,g} : sq
[native] @.att.{key,value,receptance,gate,output,ln_x} -> mix.{k,v,r,g,o,ln}
[native] @.ffn.time_mix_{k,r} -> ffn.mix_{k,r} : sq; [native] @.ffn.{key,value,receptance} -> ffn.{k,v,r}
table port @=rwkv.blocks.{i} ~=rwkv
[not native] ~.{embeddings,ln_out,blocks.0.pre_ln} -> {embed,norm,embed_norm}; [not native] head -> head
[not native] @.{ln1,ln2} -> {n1,n2}; [not native] @.attention.time_{decay,faaaa} -> mix.{decay,first}
[not native] @.attention.time_mix_{key,value,receptance,gate} -> mix.mix_{k,v,r,g} : sq
[not native] @.attention.{key,value,receptance,gate,output,ln_x} -> mix.{k,v,r,g,o,ln}
[not native] @.feed_forward.time_mix_{key,receptance} -> ffn.mix_{k,r} : sq
[not native] @.feed_forward.{key,value,receptance} -> ffn.{k,v,r}
"""

FINAL_EPS = 1e-5
"""Of the last norm, fixed in the released code; the group norm's is this times head_size_divisor squared."""


def guards(value: Spec) -> set[str]:
    """Which of the two layouts a file has."""
    return {"native"} if value.layers[0].ssm.native else set()


def native(config: Mapping[str, Any], architecture: str) -> bool:
    """Whether the file has its author's names: said by `layout`, otherwise by the absence of the port's
    class."""
    default = "port" if architecture in (config.get("architectures") or ()) else "native"
    return keys.word(config, "layout", known={"native": True, "port": False}, default=default)


def heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """(heads, width of a head)."""
    d = keys.size(config, "hidden_size")
    width = keys.size(config, "head_size", default=64)
    inner = keys.size(config, "attention_hidden_size", default=d)
    if inner % width:
        raise keys.wrong("head_size", width, f"a divisor of 'attention_hidden_size', {inner}")
    return inner // width, width


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    n_head, head_dim = heads(config)
    ssm = knobs.Rwkv5(
        n_head=n_head, head_dim=head_dim, eps=group_eps(config), native=native(config, ARCHITECTURE)
    )
    return stack(config, Layer(mixer="rwkv5", ssm=ssm, norm=Norm()), "rwkv")


def group_eps(config: Mapping[str, Any]) -> float:
    """Eps of the group norm: 1e-5 of numbers that are divided by head_size_divisor."""
    return FINAL_EPS * keys.size(config, "head_size_divisor", default=8) ** 2


def stack(config: Mapping[str, Any], layer: Layer, ffn: str) -> Spec:
    """Layers of one mixer under the keys that the ports of RWKV-5 and 6 share."""
    d = keys.size(config, "hidden_size")
    norm = Norm(kind="layer", eps=keys.real(config, "layer_norm_epsilon", default=1e-5), bias=True)
    width = keys.size(config, "intermediate_size", default=int(d * 3.5) // 32 * 32)
    layer = replace(layer, norm=norm, ffn=FFN(kind=ffn, d_ff=width, act="relu2"))
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(layer,) * keys.size(config, "num_hidden_layers"),
        final_norm=Norm(kind="layer", eps=FINAL_EPS, bias=True),
        embed_norm=norm,
        max_pos=UNBOUNDED,
        tie=keys.flag(config, "tie_word_embeddings", default=False),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    first = value.layers[0]
    ssm = first.ssm
    assert first.ffn is not None
    return {
        "vocab_size": value.vocab,
        "hidden_size": value.d,
        "num_hidden_layers": len(value.layers),
        "attention_hidden_size": ssm.n_head * ssm.head_dim,
        "head_size": ssm.head_dim,
        "num_attention_heads": ssm.n_head,
        "head_size_divisor": round((ssm.eps / FINAL_EPS) ** 0.5),
        "intermediate_size": first.ffn.d_ff,
        "layer_norm_epsilon": first.norm.eps,
        "tie_word_embeddings": value.tie,
        "layout": "native" if ssm.native else "port",
    }
