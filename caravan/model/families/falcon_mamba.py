"""Falcon-Mamba (Zuo et al. 2024, arXiv:2410.05355): Mamba whose time step, B and C are normalised without
gains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import mamba
from caravan.model.spec import Norm, Spec

ARCHITECTURE = "FalconMambaForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("tiiuae/falcon-mamba-7b*",)
RULES = "table falcon_mamba like mamba"


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    norm = Norm(kind="rms", eps=keys.real(config, "mixer_rms_eps", default=1e-6), affine=False)
    return mamba.stack(config, replace(mamba.knob(config), dt_norm=norm), tie=True)


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    return {**mamba.config(value), "mixer_rms_eps": value.layers[0].ssm.dt_norm.eps}
