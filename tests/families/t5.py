"""T5: both generations with their decoder, the encoder alone, and the encoder with a classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from caravan.kernels.attention import Segments
from caravan.model.checkpoint import load_backbone
from tests.families import VOCAB, Case, tiny, wrong_attn, wrong_ffn, wrong_spec
from tests.families.bert import APART, bare, batch, classifier, rebuild

T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 48,
    "d_kv": 10,
    "d_ff": 88,
    "num_layers": 4,
    "num_decoder_layers": 3,
    "num_heads": 6,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}
GATED = T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def target(ids_BT: Tensor) -> Tensor:
    """A target for each source: its reverse behind the start token."""
    return torch.cat([torch.zeros_like(ids_BT[:, :1]), ids_BT.flip(1)[:, :13]], 1)


def written(model: Any, ids_BT: Tensor) -> Tensor:
    """[B, 14, V] of our decoder on the target."""
    rows, width = ids_BT.shape
    out = target(ids_BT)
    memory = model(ids_BT.flatten(), torch.arange(width).repeat(rows), Segments((width,) * rows))
    states = model.decode(out.flatten(), (out.shape[1],) * rows, memory, (width,) * rows)
    return model.logits(states).view(rows, out.shape[1], -1)


def last(model: Any, ids_BT: Tensor) -> Tensor:
    return model.labels(batch(ids_BT.tolist()))


def both(**values: Any) -> Case:
    """A case of encoder and decoder together."""
    return Case(
        run=written,
        run_hf=lambda m, ids: m(input_ids=ids, decoder_input_ids=target(ids), use_cache=False).logits,
        load=load_backbone,
        rebuild=rebuild,
        packing=APART,
        left_pad=APART,
        decode="tests/parity/test_encoders.py writes token by token",
        **values,
    )


CASES = [
    both(
        name="t5",
        hf=tiny("T5Config", "T5ForConditionalGeneration", T5),
        wrong=wrong_spec(logit_scale=1.0),
    ),
    both(
        name="t5-flan",
        hf=tiny("T5Config", "T5ForConditionalGeneration", GATED),
        wrong=wrong_ffn(act="gelu"),
    ),
    both(
        name="t5-mt5",
        hf=tiny("MT5Config", "MT5ForConditionalGeneration", GATED),
        wrong=wrong_spec(logit_scale=48**-0.5),
    ),
    bare(
        name="t5-encoder",
        hf=tiny("T5Config", "T5EncoderModel", T5),
        wrong=wrong_attn(scale=10**-0.5),
    ),
    classifier(
        name="t5-labels",
        hf=tiny("T5Config", "T5ForTokenClassification", T5 | {"num_labels": 3}),
        run=last,
        run_hf=lambda m, ids: m(ids).logits[:, -1],
        wrong=wrong_spec(max_distance=64),
    ),
]
