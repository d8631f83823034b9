"""Mamba (Gu & Dao 2023, arXiv:2312.00752): selective state spaces and nothing else, the residual in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.mixers import knobs
from caravan.model.spec import Layer, Norm, Spec

ARCHITECTURE = "MambaForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("state-spaces/mamba-*-hf",)

UNBOUNDED = 1 << 20
"""Positions of a model that has none: nothing but the state ends."""

RULES = """
table mamba @=backbone.layers.{i} ~=backbone
prefix? backbone.; or ~.embedding -> embed
~.{embeddings,norm_f} -> {embed,norm}; lm_head -> head; @.norm -> n1
@.mixer.{in_proj,conv1d,x_proj,dt_proj,A_log,D,out_proj} -> mix.{inp,conv,x,dt,A_log,D,out}
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key. How time steps start is a matter of training
    from nothing and is not read."""
    return stack(config, knob(config), tie=True)


def knob(config: Mapping[str, Any]) -> knobs.Mamba:
    """The mixer of Mamba and Falcon-Mamba."""
    keys.activation(config, "hidden_act", default="silu")
    keys.refuse(config, "hidden_act", "silu", "swish")
    d = keys.size(config, "hidden_size")
    return knobs.Mamba(
        d_inner=keys.size(config, "intermediate_size", default=keys.size(config, "expand", default=2) * d),
        d_state=keys.size(config, "state_size", default=16),
        d_conv=keys.size(config, "conv_kernel", default=4),
        dt_rank=rank(config, "time_step_rank", d),
        bias=keys.flag(config, "use_bias", default=False),
        conv_bias=keys.flag(config, "use_conv_bias", default=True),
    )


def rank(config: Mapping[str, Any], name: str, d: int) -> int:
    """Width of the time step's bottleneck; "auto" is a sixteenth of the width, rounded up."""
    return -(-d // 16) if config.get(name, "auto") == "auto" else keys.size(config, name)


def stack(config: Mapping[str, Any], ssm: Any, tie: bool) -> Spec:
    """Layers of one mixer, without FFN, under the keys that Mamba 1, 2 and Falcon-Mamba share; `tie` is the
    default of the family."""
    norm = Norm(kind="rms", eps=keys.real(config, "layer_norm_epsilon", default=1e-5))
    mixer = "mamba2" if isinstance(ssm, knobs.Mamba2) else "mamba"
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=keys.size(config, "hidden_size"),
        layers=(Layer(mixer=mixer, ssm=ssm, norm=norm),) * keys.size(config, "num_hidden_layers"),
        final_norm=norm,
        max_pos=UNBOUNDED,
        tie=keys.flag(config, "tie_word_embeddings", default=tie),
        residual_fp32=keys.flag(config, "residual_in_fp32", default=True),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    ssm = value.layers[0].ssm
    return {
        **stack_config(value),
        "state_size": ssm.d_state,
        "conv_kernel": ssm.d_conv,
        "intermediate_size": ssm.d_inner,
        "expand": ssm.d_inner // value.d,
        "time_step_rank": ssm.dt_rank,
        "use_bias": ssm.bias,
        "use_conv_bias": ssm.conv_bias,
        "hidden_act": "silu",
    }


def stack_config(value: Spec) -> dict[str, Any]:
    """What `stack` read."""
    return {
        "vocab_size": value.vocab,
        "hidden_size": value.d,
        "num_hidden_layers": len(value.layers),
        "layer_norm_epsilon": value.layers[0].norm.eps,
        "residual_in_fp32": value.residual_fp32,
        "tie_word_embeddings": value.tie,
    }
