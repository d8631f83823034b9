"""Sequence mixers: what lets a token read the ones before it. The folder is the registry: `<name>.py` has
`make(d, layer, index, rope) -> nn.Module` with `forward(x_ND, index, angles, attend) -> y_ND`.

`rope` is the place of the layer's Rope in `angles` (model/positions.py), None without one. `attend` is the
context of the pass (`Attend` in model/decoder.py): attention, recurrent state, and the segments of the batch.
A module with fused matrices says in a property `fused` which parameter stacks parts of which rows; where
parts alternate (per head), the rows of one turn. Optimisers that work on whole matrices work on the parts.
"""

from __future__ import annotations

import importlib

from torch import nn

from caravan.model.spec import Layer


def make(d: int, layer: Layer, index: int, rope: int | None) -> nn.Module:
    """The module of a layer's mixer on a stream of width d."""
    return importlib.import_module(f"{__name__}.{layer.mixer}").make(d, layer, index, rope)
