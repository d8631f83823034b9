"""RWKV-4."""

from __future__ import annotations

from tests.families import LAYERS, VOCAB, Case, causal, wrong_ffn, wrong_norm

SMALL = {
    "vocab_size": VOCAB,
    "context_length": 64,
    "hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "rescale_every": 0,
    "pad_token_id": 0,
}
PADDING = "the class does not read the attention mask"

CASES = [
    Case(
        name="rwkv-4",
        hf=causal("Rwkv", SMALL),
        wrong=wrong_norm(eps=1e-3),
        left_pad=PADDING,
        gradients=True,
    ),
    Case(
        name="rwkv-4-wide",
        hf=causal("Rwkv", SMALL | {"attention_hidden_size": 64, "intermediate_size": 100}),
        wrong=wrong_ffn(kind="rwkv6"),
        left_pad=PADDING,
    ),
]
