"""model.spec: derived values, and that a Spec is a value."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest

from caravan.model.spec import FFN, MLA, Attn, Layer, Norm, Rope, RopeScaling, Spec

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


def test_context_is_not_cut_by_windows() -> None:
    narrow = replace(LAYER, attn=replace(ATTN, window=10))
    assert SPEC.context == replace(SPEC, layers=(LAYER, narrow)).context == 64


def test_frequencies_switch_only_where_they_depend_on_the_length() -> None:
    assert Rope(dim=8).switch is None
    linear, dynamic = (
        RopeScaling(kind=kind, factor=2.0, original_context=16) for kind in ("linear", "dynamic")
    )
    assert Rope(dim=8, scaling=linear).switch is None and Rope(dim=8, scaling=dynamic).switch == 16


def test_widths_of_values_and_of_what_heads_read() -> None:
    latent = replace(ATTN, mla=MLA(q_rank=None, kv_rank=6, nope=4, rope=4, v=5))
    assert ATTN.value_dim == 8 and latent.value_dim == 5
    assert SPEC.out_dim == 16 and replace(SPEC, embed_dim=12).out_dim == 12


# by hand: embedding 50 x 16; a layer: qkv 16 x 64, o 32 x 16, glu 3 x 16 x 24, two norms of 16; norm 16
BODY = 2 * (16 * 64 + 32 * 16 + 3 * 16 * 24 + 2 * 16) + 16
MLP = FFN(kind="mlp", d_ff=40, act="relu", bias=True)
BIASED = replace(LAYER, norm=LAYER_NORM, ffn=MLP,
                 attn=replace(ATTN, qkv_bias=True, o_bias=True, qk_norm=Norm()))  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        (SPEC, 800 + BODY),
        (replace(SPEC, tie=False, head_bias=True), 800 + BODY + 800 + 50),
        (replace(SPEC, tie=False, head=False, pos="learned", pos_offset=2), 800 + BODY + 66 * 16),
        (replace(SPEC, embed_dim=12, embed_norm=LAYER_NORM), 600 + 2 * 16 * 12 + 32 + BODY),
        (replace(SPEC, final_norm=None, layers=(replace(LAYER, ffn=None),)), 800 + 16 * 64 + 32 * 16 + 16),
        (
            replace(SPEC, final_norm=LAYER_NORM, layers=(BIASED,)),
            800 + (16 * 64 + 64 + 32 * 16 + 16 + 2 * 8) + (2 * 16 * 40 + 40 + 16) + 2 * 32 + 32,
        ),
    ],
)
def test_parameters_are_counted(spec: Spec, count: int) -> None:
    assert spec.parameters == count
