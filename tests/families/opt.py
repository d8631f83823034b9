"""OPT: the common shape, the 350m's, Galactica's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.families import LAYERS, VOCAB, Case, causal, wrong_attn, wrong_ffn, wrong_norm

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "ffn_dim": 100,
    "max_position_embeddings": 64,
}
OPT_350M = {"word_embed_proj_dim": 20, "do_layer_norm_before": False}
GALACTICA = {"activation_function": "gelu", "enable_bias": False, "layer_norm_elementwise_affine": False}
UNTIED = {"tie_word_embeddings": False, "word_embed_proj_dim": 20, "_remove_final_layer_norm": True}


def from_zero(spec: Any) -> Any:
    """Positions counted from 0, in a table of the same length."""
    return replace(spec, pos_offset=0, max_pos=spec.max_pos + 2)


CASES = [
    Case(name="opt", hf=causal("OPT", SMALL), wrong=from_zero),
    Case(name="opt-350m", hf=causal("OPT", SMALL | OPT_350M), wrong=wrong_norm(eps=1e-3), gradients=True),
    Case(name="opt-galactica", hf=causal("OPT", SMALL | GALACTICA), wrong=wrong_ffn(act="gelu_new")),
    Case(name="opt-untied-no-final-norm", hf=causal("OPT", SMALL | UNTIED), wrong=wrong_attn(scale=1.0)),
]
