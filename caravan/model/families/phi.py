"""Phi-1, 1.5 and 2 (Gunasekar et al. 2023, arXiv:2306.11644): attention and MLP side by side behind one norm,
rotation of a share of each head, biases everywhere, the head included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import gpt_neox, llama
from caravan.model.spec import FFN, Norm, Spec

ARCHITECTURE = "PhiForCausalLM"
CLASSIFIER = "PhiForSequenceClassification"
CHECKPOINTS = ("microsoft/phi-1", "microsoft/phi-1_5", "microsoft/phi-2")

RULES = """
table @=model.layers.{i} ~=model
prefix? model.
drop rotary_emb
~.{embed_tokens,final_layernorm} -> {embed,norm}; lm_head -> head; @.input_layernorm -> n1
@.self_attn.{q,k,v}_proj -> mix.qkv : cat; @.self_attn.{dense,q_layernorm,k_layernorm} -> mix.{o,qn,kn}
@.mlp.{fc1,fc2} -> ffn.{inp,out}
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    value = replace(biased(config, act="gelu_new", qk_norm=False, context=2048), head_bias=True)
    return llama.with_layers(replace(value, tie=keys.untied(config)), parallel=True, shared_norm=True)


def biased(config: Mapping[str, Any], act: str, qk_norm: bool, context: int) -> Spec:
    """Phi and Persimmon: layer norms, biases everywhere, half of each head rotated, no gate; the rest is what
    they assume when no key says it."""
    norm = Norm(kind="layer", eps=keys.positive(config, "layer_norm_eps", default=1e-5), bias=True)
    named = keys.activation(config, "hidden_act", default=act)
    return gpt_neox.equal_layers(
        config,
        norm,
        FFN(kind="mlp", d_ff=keys.size(config, "intermediate_size"), act=named, bias=True),
        whole=0.5,
        context=context,
        qkv_bias=True,
        o_bias=True,
        qk_norm=norm if keys.flag(config, "qk_layernorm", default=qk_norm) else None,
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    return gpt_neox.equal_config(value)
