"""Mamba-2 (Dao & Gu 2024, arXiv:2405.21060): one decay per head, a gated norm behind the state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.families import mamba
from caravan.model.mixers import knobs
from caravan.model.spec import Spec
from caravan.types import UserError

ARCHITECTURE = "Mamba2ForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("mistralai/Mamba-Codestral-7B-v0.1", "AntonV/mamba2-*-hf")

RULES = """
table mamba2 like mamba
- mix.x; - mix.dt; @.mixer.dt_bias -> mix.dt_bias; @.mixer.norm -> mix.norm
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key. `chunk_size` changes
    no result and is not read."""
    keys.refuse(config, "hidden_act", "silu", "swish")
    d = keys.size(config, "hidden_size")
    ssm = knobs.Mamba2(
        n_head=keys.size(config, "num_heads", default=128),
        head_dim=keys.size(config, "head_dim", default=64),
        d_state=keys.size(config, "state_size", default=128),
        n_group=keys.size(config, "n_groups", default=8),
        d_conv=keys.size(config, "conv_kernel", default=4),
        bias=keys.flag(config, "use_bias", default=False),
        conv_bias=keys.flag(config, "use_conv_bias", default=True),
        eps=keys.real(config, "layer_norm_epsilon", default=1e-5),
        dt_limit=limits(config),
    )
    if ssm.n_head % ssm.n_group:
        raise keys.wrong("n_groups", ssm.n_group, f"a divisor of the number of heads, {ssm.n_head}")
    if keys.size(config, "expand", default=2) * d != ssm.n_head * ssm.head_dim:
        raise UserError(
            f"config.json: 'num_heads' x 'head_dim' is {ssm.n_head * ssm.head_dim}, but 'expand' x "
            f"'hidden_size' is {keys.size(config, 'expand', default=2) * d}"
        )
    return mamba.stack(config, ssm, tie=False)


def limits(config: Mapping[str, Any]) -> tuple[float, float]:
    """Bounds of a time step: numbers, or {"__float__": "Infinity"}, which is how transformers 5 writes what
    JSON lacks."""
    value = config.get("time_step_limit")
    if value is None:
        return 0.0, float("inf")
    try:
        low, high = (float(v["__float__"] if isinstance(v, Mapping) else v) for v in value)
    except (TypeError, ValueError, KeyError):
        raise keys.wrong("time_step_limit", value, "two numbers") from None
    return low, high


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    ssm = value.layers[0].ssm
    return {
        **mamba.stack_config(value),
        "num_heads": ssm.n_head,
        "head_dim": ssm.head_dim,
        "state_size": ssm.d_state,
        "n_groups": ssm.n_group,
        "conv_kernel": ssm.d_conv,
        "expand": ssm.n_head * ssm.head_dim // value.d,
        "use_bias": ssm.bias,
        "use_conv_bias": ssm.conv_bias,
        "hidden_act": "silu",
        "time_step_limit": [v if v < float("inf") else {"__float__": "Infinity"} for v in ssm.dt_limit],
    }
