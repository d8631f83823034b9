"""BERT: the bare encoder, and classifiers whose labels are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from caravan.kernels.attention import Segments
from caravan.model import checkpoint, families
from caravan.model.decoder import Decoder
from caravan.model.heads import PooledHead, RewardModel
from caravan.types import Batch
from tests.families import LAYERS, VOCAB, Case, tiny, wrong_attn, wrong_ffn, wrong_norm, wrong_spec

ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "intermediate_size": 88,
    "max_position_embeddings": 64,
}
APART = "an encoder answers once per text: tests/parity/test_encoders.py packs and pads"
NO_DECODER = "an encoder does not write"


def batch(rows: list[list[int]]) -> Batch:
    """Rows laid end to end; no targets."""
    ids = torch.tensor([i for row in rows for i in row])
    pos = torch.cat([torch.arange(len(row)) for row in rows])
    return Batch(ids, pos, tuple(map(len, rows)), torch.zeros_like(ids), torch.zeros(len(ids)))


def labels(model: RewardModel, ids_BT: Tensor) -> Tensor:
    """[B, L] of our classifier."""
    return model.labels(batch(ids_BT.tolist()))


def states(model: Any, ids_BT: Tensor) -> Tensor:
    """[B, T, D] of our bare encoder."""
    rows, width = ids_BT.shape
    hidden = model(ids_BT.flatten(), torch.arange(width).repeat(rows), Segments((width,) * rows))
    return hidden.view(rows, width, -1)


def save(model: RewardModel, folder: Path) -> None:
    checkpoint.save_reward(model, folder, dtype=torch.float32)


def rebuild(model: Any, spec: Any) -> Any:
    """A fresh module of another Spec."""
    if not isinstance(model, RewardModel):
        return getattr(families.find(model.family), "MODULE", Decoder)(spec, model.family)
    family = families.find(model.decoder.family)
    head = PooledHead(spec.d, family.POOL, model.score.score.out_features)
    return RewardModel(rebuild(model.decoder, spec), head)


def classifier(**values: Any) -> Case:
    """A case of a ...ForSequenceClassification."""
    shared: dict[str, Any] = {
        "run": labels, "run_hf": lambda m, ids: m(ids).logits, "load": checkpoint.load_classifier,
        "save": save, "rebuild": rebuild, "packing": APART, "left_pad": APART, "decode": NO_DECODER,
    }  # fmt: skip
    return Case(**(shared | values))


def bare(**values: Any) -> Case:
    """A case of an encoder without a head."""
    return classifier(
        **{
            "run": states, "run_hf": lambda m, ids: m(ids).last_hidden_state,
            "load": checkpoint.load_backbone, "save": None,
        } | values
    )  # fmt: skip


CASES = [
    classifier(
        name="bert-reward",
        hf=tiny("BertConfig", "BertForSequenceClassification", ENCODER | {"num_labels": 1}),
        wrong=wrong_attn(causal=True),
    ),
    classifier(
        name="bert-labels",
        hf=tiny("BertConfig", "BertForSequenceClassification", ENCODER | {"num_labels": 3}),
        wrong=wrong_ffn(act="gelu_new"),
    ),
    bare(name="bert-bare", hf=tiny("BertConfig", "BertModel", ENCODER), wrong=wrong_norm(eps=1e-3)),
    bare(
        name="bert-masked-lm",
        hf=tiny("BertConfig", "BertForMaskedLM", ENCODER),
        run_hf=lambda m, ids: m.bert(ids).last_hidden_state,
        wrong=wrong_spec(pos="none"),
    ),
]
