"""RWKV-6 "Finch" (Peng et al. 2024, arXiv:2404.05892): RWKV-5 whose decay and token shift depend on the
token. Two layouts, as with RWKV-5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.families import rwkv5
from caravan.model.families.rwkv5 import guards
from caravan.model.mixers import knobs
from caravan.model.spec import Layer, Norm, Spec

__all__ = ["guards"]

ARCHITECTURE = "Rwkv6ForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("RWKV/rwkv-6-world-*", "RWKV/v6-Finch-*-HF")

RULES = """
table native @=blocks.{i}
[native] {emb,ln_out,head,blocks.0.ln0} -> {embed,norm,head,embed_norm}
[native] @.{ln1,ln2} -> {n1,n2}; [native] @.att.time_faaaa -> mix.first
[native] @.att.time_decay -> mix.decay : sq
[native] @.att.time_maa_{x,w,k,v,r,g} -> mix.mix_{x,w,k,v,r,g} : sq
[native] @.att.time_{maa_w1,maa_w2,decay_w1,decay_w2} -> mix.{mix_w1,mix_w2,decay_w1,decay_w2}
[native] @.att.{key,value,receptance,gate,output,ln_x} -> mix.{k,v,r,g,o,ln}
[native] @.ffn.time_maa_{k,r} -> ffn.mix_{k,r} : sq; [native] @.ffn.{key,value,receptance} -> ffn.{k,v,r}
table port @=rwkv.blocks.{i} ~=rwkv
[not native] ~.{embeddings,ln_out,blocks.0.pre_ln} -> {embed,norm,embed_norm}; [not native] head -> head
[not native] @.{ln1,ln2} -> {n1,n2}; [not native] @.attention.time_faaaa -> mix.first
[not native] @.attention.time_decay -> mix.decay : sq
[not native] @.attention.time_maa_{x,w,k,v,r,g} -> mix.mix_{x,w,k,v,r,g} : sq
[not native] @.attention.time_{maa_w1,maa_w2,decay_w1,decay_w2} -> mix.{mix_w1,mix_w2,decay_w1,decay_w2}
[not native] @.attention.{key,value,receptance,gate,output,ln_x} -> mix.{k,v,r,g,o,ln}
[not native] @.feed_forward.time_maa_{k,r} -> ffn.mix_{k,r} : sq
[not native] @.feed_forward.{key,value,receptance} -> ffn.{k,v,r}
"""

LARGE = 4096
"""The width from which on the released code doubles the ranks of its low-rank maps."""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key. The ports have no keys for the ranks: they are 32
    and 64, in models 4096 wide 64 and 128; `time_mix_extra_dim` and `time_decay_extra_dim` overrule that."""
    n_head, head_dim = rwkv5.heads(config)
    double = 2 if keys.size(config, "hidden_size") == LARGE else 1
    ssm = knobs.Rwkv6(
        n_head=n_head,
        head_dim=head_dim,
        mix_rank=keys.size(config, "time_mix_extra_dim", default=32 * double),
        decay_rank=keys.size(config, "time_decay_extra_dim", default=64 * double),
        eps=rwkv5.group_eps(config),
        native=rwkv5.native(config, ARCHITECTURE),
    )
    return rwkv5.stack(config, Layer(mixer="rwkv6", ssm=ssm, norm=Norm()), "rwkv6")


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    ssm = value.layers[0].ssm
    ranks = {"time_mix_extra_dim": ssm.mix_rank, "time_decay_extra_dim": ssm.decay_rank}
    return {**rwkv5.config(value), **ranks}
