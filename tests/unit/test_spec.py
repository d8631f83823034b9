"""model.spec: derived values, and that a Spec is a value."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest

from caravan.model.decoder import Decoder
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, Spec

LAYER_NORM = Norm(kind="layer", bias=True)
ATTN = Attn(n_head=4, n_kv=2, head_dim=8, rope=Rope(dim=8))
LAYER = Layer(attn=ATTN, ffn=FFN(kind="glu", d_ff=24, act="silu"), norm=Norm())
SPEC = Spec(vocab=50, d=16, layers=(LAYER, LAYER), final_norm=Norm(), max_pos=64)


def test_scale_defaults_to_the_head_width() -> None:
    assert ATTN.scale == 8**-0.5 and replace(ATTN, scale=1.0).scale == 1.0


def test_query_heads_must_divide_among_key_heads() -> None:
    with pytest.raises(AssertionError):
        Attn(n_head=5, n_kv=2, head_dim=8)


def test_a_spec_is_a_hashable_value() -> None:
    assert hash(SPEC) == hash(replace(SPEC)) and replace(SPEC) == SPEC
    with pytest.raises(dataclasses.FrozenInstanceError):
        SPEC.vocab = 3  # type: ignore[misc]


def test_context_stops_at_the_narrowest_window() -> None:
    assert SPEC.context == 64
    narrow = replace(LAYER, attn=replace(ATTN, window=10))
    assert replace(SPEC, layers=(LAYER, narrow)).context == 10


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, tie=False, head_bias=True),
        replace(SPEC, tie=False, head=False, pos="learned"),
        replace(SPEC, final_norm=LAYER_NORM, layers=(replace(
            LAYER, norm=LAYER_NORM, ffn=FFN(kind="mlp", d_ff=40, act="relu", bias=True),
            attn=replace(ATTN, qkv_bias=True, o_bias=True, qk_norm=Norm())),)),
    ],
)  # fmt: skip
def test_parameters_are_counted(spec: Spec) -> None:
    assert spec.parameters == sum(p.numel() for p in Decoder(spec).parameters())
