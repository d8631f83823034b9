"""CPM-Ant: prompt rows in front, a bias per bucket and pair of segments, context seen both ways.

The class reads all it is given at once both ways, and what it is then given token by token causally.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from caravan.kernels.attention import Segments
from tests.families import LENGTH, VOCAB, Case, causal, wrong_ffn, wrong_spec
from tests.families.bert import rebuild

ANSWER = 2
"""What stands before it is context."""
ANT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "dim_head": 10,
    "dim_ff": 88,
    "num_hidden_layers": 4,
    "prompt_types": 4,
    "prompt_length": 5,
    "segment_types": 3,
    "position_bias_num_buckets": 16,
    "position_bias_max_distance": 32,
}


def ids() -> Tensor:
    """Two rows, answers from different places on."""
    drawn = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    drawn[0, 6] = drawn[1, 2] = ANSWER
    return drawn


def stepped(hf: Any, ids_BT: Tensor) -> Tensor:
    """Logits of the class, context first and then one token at a time."""
    said = []
    for row in ids_BT:
        context = row.tolist().index(ANSWER)
        out = hf(input_ids=row[None, :context], use_cache=True)
        parts = [out.logits]
        for t in range(context, len(row)):
            out = hf(input_ids=row[None, : t + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
        said.append(torch.cat(parts, 1)[0])
    return torch.stack(said)


def everything_context(model: Any, ids_BT: Tensor) -> Tensor:
    """[B, T, V] of ours without anything that says where the context ends."""
    rows, width = ids_BT.shape
    hidden = model(ids_BT.flatten(), torch.arange(width).repeat(rows), Segments((width,) * rows))
    return model.logits(hidden).view(rows, width, -1)


def case(name: str, wrong: Any, values: dict[str, Any], **more: Any) -> Case:
    return Case(
        name=name,
        hf=causal("CpmAnt", ANT | values),
        wrong=wrong,
        rebuild=rebuild,
        left_pad="the class takes id 0 for padding and counts it from the wrong end",
        **more,
    )


CASES = [
    case(
        "cpmant",
        wrong_ffn(act="gelu_new"),
        {"answer_token_id": ANSWER},
        ids=ids,
        run_hf=stepped,
        packing="the class cannot read a text without context: tests/parity/test_cpm.py packs",
    ),
    case(
        "cpmant-one-prompt",
        wrong_spec(max_pos=64),
        {"prompt_length": 1, "prompt_types": 3},
        run=everything_context,
        packing="everything is context here",
        decode="a new token would change what earlier ones saw",
    ),
]
