"""A flat batch through a model: every stage that reads whole sequences goes through here.

N flat tokens, D width of the hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from caravan.kernels.attention import Segments
from caravan.model.decoder import prefixes
from caravan.types import Batch

ROUND = 64
"""oneDNN prepares, and keeps, kernels for every shape it meets. Batches of any length would be a new shape
each; rounded, they are few."""


def hidden_states(model: Any, batch: Batch) -> tuple[Tensor, Segments]:
    """[N, D] of a Decoder or what wraps one, and the context the batch was read in.

    On CPUs in bf16 the batch is read with up to ROUND - 1 tokens behind it, as a segment of their own that
    nobody sees. Not where experts are chosen: their statistics would count those tokens.
    """
    ids_N, pos_N, lengths, weight_N = batch.ids_N, batch.pos_N, batch.lengths, batch.weight_N
    more = -len(ids_N) % ROUND if _rounds(model) else 0
    if more:
        # All at position 0: a table of positions may be shorter than they are many.
        ids_N, pos_N, weight_N = (F.pad(x, (0, more)) for x in (ids_N, pos_N, weight_N))
        lengths = (*lengths, more)
    attend = Segments(lengths, ids_N.device, prefixes(model.spec, ids_N, lengths, weight_N))
    hidden_ND = model(ids_N, pos_N, attend)
    return hidden_ND[: len(hidden_ND) - more], attend


def _rounds(model: Any) -> bool:
    weight = next(model.parameters())
    routed = any(layer.ffn is not None and layer.ffn.moe is not None for layer in model.spec.layers)
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not routed
