"""T5, T5 v1.1, Flan-T5, T0, mT5 (Raffel et al. 2020, arXiv:1910.10683): model/encoders/t5.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.encoders.t5 import T5, T5Spec
from caravan.model.heads import Pool
from caravan.model.spec import FFN, Attn, Layer, Norm

ARCHITECTURE = "T5ForConditionalGeneration"
CLASSIFIER = "T5ForTokenClassification"
CHECKPOINTS = ("google-t5/t5-*", "google/t5-v1_1-*", "google/flan-t5-*", "bigscience/T0*", "google/mt5-*")
POOL = Pool(act=None, reads="last")
"""The encoder's state of the last token, through one matrix: what transformers calls token classification."""
MODULE = T5
ALIASES = ("mt5",)
ENCODERS = ("T5EncoderModel", "T5ForTokenClassification")
"""Architectures without a decoder."""

RULES = r"""
table @=transformer.encoder.block.{i} ~=transformer.encoder => enc.blocks.{i}
prefix? transformer.
drop embed_tokens\.weight$
transformer.shared -> embed; lm_head -> head; classifier -> score
~.block.0.layer.0.SelfAttention.relative_attention_bias -> enc.rel; ~.final_layer_norm -> enc.norm
@.layer.0.layer_norm -> n1; @.layer.0.SelfAttention.{q,k,v} -> a.proj : cat; @.layer.0.SelfAttention.o -> a.o
@.layer.1.layer_norm -> n2; @.layer.1.DenseReluDense.wo -> ffn.out
[not gated] @.layer.1.DenseReluDense.wi -> ffn.inp
[gated] @.layer.1.DenseReluDense.{wi_0,wi_1} -> ffn.inp : cat
table @=transformer.decoder.block.{i} ~=transformer.decoder => dec.blocks.{i}
~.block.0.layer.0.SelfAttention.relative_attention_bias -> dec.rel; ~.final_layer_norm -> dec.norm
@.layer.0.layer_norm -> n1; @.layer.0.SelfAttention.{q,k,v} -> a.proj : cat; @.layer.0.SelfAttention.o -> a.o
@.layer.1.layer_norm -> nx; @.layer.1.EncDecAttention.{k,v} -> x.kv : cat
@.layer.1.EncDecAttention.{q,o} -> x.{q,o}
@.layer.2.layer_norm -> n2; @.layer.2.DenseReluDense.wo -> ffn.out
[not gated] @.layer.2.DenseReluDense.wi -> ffn.inp
[gated] @.layer.2.DenseReluDense.{wi_0,wi_1} -> ffn.inp : cat
"""
KEPT = r"^classifier\.|EncDecAttention\.relative_attention_bias\.weight$"
"""A head that a use of the file may not need; a table that old files hold and nobody reads."""


def spec(config: Mapping[str, Any]) -> T5Spec:
    """config.json -> T5Spec.

    `tie_word_embeddings: false` used to mean two things: a head of its own, and hidden states not scaled
    before it. Newer files say the second in `scale_decoder_outputs`, which is believed first.
    """
    d, heads, width = (keys.size(config, key) for key in ("d_model", "num_heads", "d_kv"))
    layers = keys.size(config, "num_layers", "num_hidden_layers")
    alone = bool({*(config.get("architectures") or [])} & {*ENCODERS}) or (
        config.get("is_encoder_decoder") is False
    )
    tie = keys.flag(config, "tie_word_embeddings", default=True)
    many = config.get("model_type") == "mt5"  # multilingual v1.1: gated and never scaled unless it says so
    scaled = keys.flag(config, "scale_decoder_outputs", default=tie and not many)
    kind, act = _feed_forward(config, "gated-gelu" if many else "relu")
    norm = Norm(kind="rms", eps=keys.real(config, "layer_norm_epsilon", default=1e-6))
    layer = Layer(
        attn=Attn(n_head=heads, n_kv=heads, head_dim=width, scale=1.0, causal=False),
        ffn=FFN(kind=kind, d_ff=keys.size(config, "d_ff"), act=act),
        norm=norm,
    )
    return T5Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(layer,) * layers,
        dec_layers=keys.size(config, "num_decoder_layers", default=layers),
        buckets=keys.size(config, "relative_attention_num_buckets", default=32),
        max_distance=keys.size(config, "relative_attention_max_distance", default=128),
        max_pos=keys.size(config, "n_positions", default=512),
        final_norm=norm,
        tie=tie,
        head=not alone,
        logit_scale=d**-0.5 if scaled else 1.0,
        start=keys.find(config, ("decoder_start_token_id", "pad_token_id"), 0)[1],
    )


def _feed_forward(config: Mapping[str, Any], default: str) -> tuple[str, Any]:
    """(kind, activation) of `feed_forward_proj`: an activation, or 'gated-' and one; there, gelu is the tanh
    form."""
    text = keys.find(config, ("feed_forward_proj",), default)[1]
    if not isinstance(text, str):
        raise keys.wrong("feed_forward_proj", text, "a word")
    gated, name = text.startswith("gated-"), text.removeprefix("gated-")
    if name not in keys.ACTIVATIONS:
        raise keys.unsupported("feed_forward_proj", text, sorted(keys.ACTIVATIONS))
    return ("glu", "gelu_new" if name == "gelu" else keys.ACTIVATIONS[name]) if gated else (
        "mlp", keys.ACTIVATIONS[name]
    )  # fmt: skip


def config(value: T5Spec) -> dict[str, Any]:
    """T5Spec -> config.json."""
    first = value.layers[0]
    assert first.attn is not None and first.ffn is not None
    act: str = first.ffn.act
    if first.ffn.kind == "glu":
        act = "gated-gelu" if act == "gelu_new" else f"gated-{act}"
    return {
        "is_encoder_decoder": value.head,
        "d_model": value.d,
        "num_heads": first.attn.n_head,
        "d_kv": first.attn.head_dim,
        "d_ff": first.ffn.d_ff,
        "num_layers": len(value.layers),
        "num_decoder_layers": value.dec_layers,
        "feed_forward_proj": act,
        "relative_attention_num_buckets": value.buckets,
        "relative_attention_max_distance": value.max_distance,
        "n_positions": value.max_pos,
        "layer_norm_epsilon": first.norm.eps,
        "vocab_size": value.vocab,
        "tie_word_embeddings": value.tie,
        "scale_decoder_outputs": value.logit_scale != 1.0,
        "decoder_start_token_id": value.start,
    }
