"""Position-wise parts of a layer. The folder is the registry: `<kind>.py` has
`make(d, ffn) -> nn.Module` with `forward(x_ND, index, attend) -> y_ND`, where `index` is the layer's number
and `attend` the context of the pass (an FFN with state keeps it under -1 - index)."""

from __future__ import annotations

import importlib

from torch import nn

from caravan.model.spec import FFN


def make(d: int, ffn: FFN) -> nn.Module:
    """The module of an FFN on a stream of width d."""
    return importlib.import_module(f"{__name__}.{ffn.kind}").make(d, ffn)
