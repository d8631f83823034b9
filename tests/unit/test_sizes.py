"""model.sizes: every number has a reason, and fresh models start where they should."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from caravan.kernels.attention import Segments
from caravan.model import sizes
from caravan.model.spec import Norm
from caravan.types import UserError


@pytest.mark.parametrize(
    ("size", "low", "high"),
    [
        ("nano", 0.9e6, 1.8e6),
        ("tiny", 5e6, 7e6),
        ("small", 25e6, 29e6),
        ("gpt2", 80e6, 130e6),
        ("1b", 0.9e9, 1.2e9),
    ],
)
def test_named_sizes_weigh_what_they_say(size: str, low: float, high: float) -> None:
    spec, reasons = sizes.derive(size, None, 4096, 512)
    assert low < spec.parameters < high
    assert all(reason.why for reason in reasons)
    values = {reason.name: reason.value for reason in reasons}
    assert values["layers"] == len(spec.layers) and values["width"] == spec.d
    assert values["query heads"] == spec.layers[0].attn.n_head and values["parameters"] == spec.parameters
    assert values["feed-forward width"] == spec.layers[0].ffn.d_ff


def test_small_is_the_benchmark_shape() -> None:
    spec, _ = sizes.derive("small", None, 4096, 512)
    layer = spec.layers[0]
    assert (spec.d, len(spec.layers), layer.ffn.d_ff, layer.attn.n_head, layer.attn.head_dim) == (
        512,
        8,
        1408,
        8,
        64,
    )


@pytest.mark.parametrize("depth", range(1, 41))
def test_any_depth_gives_a_sound_model(depth: int) -> None:
    spec, _ = sizes.derive(None, depth, 1000, 128)
    attn = spec.layers[0].attn
    assert spec.d == 64 * depth == attn.n_head * attn.head_dim and len(spec.layers) == depth
    assert attn.n_head % attn.n_kv == 0 and spec.layers[0].ffn.d_ff % 64 == 0


@pytest.mark.parametrize(
    ("size", "depth", "vocab"), [("huge", None, 100), (None, None, 100), ("nano", 3, 100), (None, 0, 100),
    ("nano", None, 1)]
)  # fmt: skip
def test_impossible_requests_are_explained(size: str | None, depth: int | None, vocab: int) -> None:
    with pytest.raises(UserError):
        sizes.derive(size, depth, vocab, 64)


def test_fresh_loss_is_ln_vocabulary() -> None:
    spec, reasons = sizes.derive("nano", None, 300, 64)
    model = sizes.fresh(spec, seed=0)
    ids = torch.randint(0, 300, (128,), generator=torch.Generator().manual_seed(1))
    logits = model.logits(model(ids, torch.arange(64).repeat(2), Segments((64, 64))))
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
    assert loss.item() == pytest.approx(math.log(300), abs=0.1)
    assert next(r.value for r in reasons if r.name == "step-0 loss") == pytest.approx(math.log(300), abs=1e-3)


def test_weights_follow_from_the_seed_alone() -> None:
    spec, _ = sizes.derive("nano", None, 100, 32)
    first = sizes.fresh(spec, seed=3).state_dict()
    torch.manual_seed(99)
    torch.rand(7)
    second, other = sizes.fresh(spec, seed=3).state_dict(), sizes.fresh(spec, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])


def test_residual_outputs_start_smaller_with_depth() -> None:
    spec, _ = sizes.derive("nano", None, 100, 32)
    weights = sizes.fresh(spec, seed=0).state_dict()
    inner, outer = weights["blocks.1.mix.qkv.weight"].std(), weights["blocks.1.mix.o.weight"].std()
    assert float(inner) == pytest.approx(0.02, rel=0.05)
    assert float(outer / inner) == pytest.approx((2 * len(spec.layers)) ** -0.5, rel=0.05)
    assert float(weights["blocks.1.ffn.out.weight"].std() / outer) == pytest.approx(1.0, rel=0.05)
    assert bool((weights["blocks.0.n1.weight"] == 1).all())


def test_gains_of_heads_and_of_one_plus_w_start_at_one() -> None:
    spec, _ = sizes.derive("nano", None, 100, 32)
    gain = Norm(unit_offset=True)
    attn = replace(spec.layers[0].attn, qk_norm=Norm(kind="layer"), qk_norm_over="per_head")
    layer = replace(spec.layers[0], norm=gain, attn=attn)
    weights = sizes.fresh(replace(spec, layers=(layer,)), seed=0).state_dict()
    assert bool((weights["blocks.0.n1.weight"] == 0).all())
    assert bool((weights["blocks.0.mix.qn.weight"] == 1).all())
