"""RWKV-4 (Peng et al. 2023, arXiv:2305.13048): a fading average instead of attention, token shift instead of
positions.

`rescale_every` is a habit of the released class, which halves weights and stream at inference every so many
layers so that fp16 does not overflow; it changes no result and is not read. (A file saved by that class after
its first evaluation holds the halved weights: there is no way to tell.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.mixers import knobs
from caravan.model.spec import FFN, Layer, Norm, Spec

ARCHITECTURE = "RwkvForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("RWKV/rwkv-4-*-pile", "RWKV/rwkv-raven-*")

RULES = """
table rwkv @=rwkv.blocks.{i} ~=rwkv
prefix? rwkv.
~.{embeddings,ln_out,blocks.0.pre_ln} -> {embed,norm,embed_norm}; head -> head; @.{ln1,ln2} -> {n1,n2}
@.attention.time_{decay,first} -> mix.{decay,first}
@.attention.time_mix_{key,value,receptance} -> mix.mix_{k,v,r} : sq
@.attention.{key,value,receptance,output} -> mix.{k,v,r,o}
@.feed_forward.time_mix_{key,receptance} -> ffn.mix_{k,r} : sq
@.feed_forward.{key,value,receptance} -> ffn.{k,v,r}
"""

FINAL_EPS = 1e-5
"""Of the last norm, fixed in the released code."""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    d = keys.size(config, "hidden_size")
    ssm = knobs.Rwkv4(d_att=keys.size(config, "attention_hidden_size", default=d))
    norm = Norm(kind="layer", eps=keys.real(config, "layer_norm_epsilon", default=1e-5), bias=True)
    ffn = FFN(kind="rwkv", d_ff=keys.size(config, "intermediate_size", default=4 * d), act="relu2")
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(Layer(mixer="rwkv4", ssm=ssm, ffn=ffn, norm=norm),) * keys.size(config, "num_hidden_layers"),
        final_norm=Norm(kind="layer", eps=FINAL_EPS, bias=True),
        embed_norm=norm,
        max_pos=keys.size(config, "context_length", "max_position_embeddings", default=1024),
        tie=keys.flag(config, "tie_word_embeddings", default=False),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    first = value.layers[0]
    assert first.ffn is not None
    return {
        "vocab_size": value.vocab,
        "hidden_size": value.d,
        "num_hidden_layers": len(value.layers),
        "attention_hidden_size": first.ssm.d_att,
        "intermediate_size": first.ffn.d_ff,
        "layer_norm_epsilon": first.norm.eps,
        "context_length": value.max_pos,
        "tie_word_embeddings": value.tie,
    }
