"""StableLM 3B and 2 (Bellagente et al. 2024, arXiv:2402.17834): Llama with layer norms and a quarter of each
head rotated; the 12B runs its sublayers side by side and gives every query and key head its own gain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.families import gpt_neox, llama
from caravan.model.spec import FFN, Norm, Spec

ARCHITECTURE = "StableLmForCausalLM"
CLASSIFIER = "StableLmForSequenceClassification"
ALIASES = ("stablelm_epoch",)
CHECKPOINTS = ("stabilityai/stablelm-3b-4e1t", "stabilityai/stablelm-2-1_6b", "stabilityai/stablelm-2-12b")

RULES = """
table @=model.layers.{i} ~=model
prefix? model.
drop rotary_emb
~.{embed_tokens,norm} -> {embed,norm}; lm_head -> head; @.{input,post_attention}_layernorm -> {n1,n2}
@.self_attn.{q,k,v}_proj -> mix.qkv : cat; @.self_attn.o_proj -> mix.o
@.self_attn.{q,k}_layernorm.norms.{h} -> mix.{qn,kn}
@.mlp.{gate,up}_proj -> ffn.inp : cat; @.mlp.down_proj -> ffn.out
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec; the first releases (model_type stablelm_epoch) spell norm_eps and rope_pct.

    Raises UserError naming the key.
    """
    eps = keys.positive(config, "layer_norm_eps", "norm_eps", default=1e-5)
    act = keys.activation(config, "hidden_act", default="silu")
    value = gpt_neox.equal_layers(
        config,
        Norm(kind="layer", eps=eps, bias=True),
        FFN(kind="glu", d_ff=keys.size(config, "intermediate_size"), act=act),
        share=("rope_pct",),
        whole=0.25,
        context=4096,
        qkv_bias=keys.flag(config, "use_qkv_bias", default=False),
        qk_norm=Norm(kind="layer", eps=eps) if keys.flag(config, "qk_layernorm", default=False) else None,
        qk_norm_over="per_head",
    )
    parallel = keys.flag(config, "use_parallel_residual", default=False)
    return llama.with_layers(value, parallel=parallel, shared_norm=parallel)


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    first = value.layers[0]
    return {
        **gpt_neox.equal_config(value),
        "use_qkv_bias": first.attn.qkv_bias,
        "use_parallel_residual": first.parallel,
    }
