"""Falcon-Mamba: normalised time step, B and C."""

from __future__ import annotations

from caravan.model.spec import Norm
from tests.families import Case, causal, change
from tests.families.mamba import MAMBA

CASES = [
    Case(
        name="falcon-mamba",
        hf=causal("FalconMamba", MAMBA | {"mixer_rms_eps": 1e-3}),
        wrong=lambda spec: change(spec, "ssm", dt_norm=Norm(eps=1e-6, affine=False)),
        gradients=True,
    )
]
