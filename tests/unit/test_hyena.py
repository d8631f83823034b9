"""Hyena: the long filter by FFT against its recurrence, and StripedHyena's config.json."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from caravan.kernels import longconv
from caravan.model.families import stripedhyena
from caravan.model.mixers import knobs
from caravan.model.spec import Layer, Norm
from caravan.types import UserError
from tests.families.stripedhyena import CONFIG
from tests.unit.recurrent import LENGTHS, Pass, Stack, agree, goes_on, stirred

D, Z = 6, 3
LAYER = Layer(mixer="hyena", ssm=knobs.Hyena(n_head=2, d_state=Z), norm=Norm())


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def poles() -> torch.Tensor:
    size, angle = 0.4 + 0.59 * torch.sigmoid(draw(D, Z)), draw(D, Z, seed=1)
    return torch.stack([size * angle.cos(), size * angle.sin()], -1)


@pytest.mark.parametrize("begun", [False, True], ids=["fresh", "begun"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_fft_is_the_recurrence(lengths: tuple[int, ...], begun: bool) -> None:
    inputs = [draw(sum(lengths), D, seed=2), poles(), draw(D, Z, 2, seed=3)]
    inputs += [draw(len(lengths), D, Z, 2, seed=4)] if begun else []

    def fast(u, p, r, *first):  # type: ignore[no-untyped-def]
        return longconv.long_conv(lengths, u, p, r, *first), longconv.long_conv_state(lengths, u, p, *first)

    agree(lambda *a: longconv.reference_long_conv(lengths, *a), fast, inputs)


def test_a_step_is_the_recurrence() -> None:
    u, p, r, state = draw(4, D), poles(), draw(D, Z, 2, seed=3), draw(4, D, Z, 2, seed=4)
    y, after = longconv.long_conv_step(u, p, r, state)
    want, last = longconv.reference_long_conv((1,) * 4, u, p, r, state)
    assert torch.allclose(y, want, atol=1e-12) and torch.allclose(after, last, atol=1e-12)


def test_a_pole_at_zero_is_a_filter_of_one_tap() -> None:
    p = torch.zeros(D, 1, 2, requires_grad=True)
    u = torch.randn(9, D)
    y = longconv.long_conv((9,), u, p, torch.tensor([2.0, 0.0]).expand(D, 1, 2))
    y.sum().backward()
    assert torch.allclose(y, 2 * u, atol=1e-5) and torch.isfinite(p.grad).all()


def test_fft_lengths_are_long_enough_and_smooth() -> None:
    for least in range(1, 300):
        size = longconv._fft_size(least)
        assert least <= size < 2 * least + 1
        for prime in (2, 3, 5):
            while size % prime == 0:
                size //= prime
        assert size == 1


def test_a_pass_goes_on_where_the_last_one_stopped() -> None:
    model = stirred(Stack(D, LAYER, 2)).double()
    for mixer in model.mixers:
        mixer.poles.data.copy_(poles().unsqueeze(2))  # stirred ones may grow without end
    goes_on(model, D)


def test_modes_are_fp32_in_a_bf16_model() -> None:
    model = stirred(Stack(D, LAYER, 1)).bfloat16()
    attend = Pass((20,))
    assert model(torch.randn(20, D).bfloat16(), attend).dtype == torch.bfloat16
    assert attend.after[0]["iir"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hyena_filter_groups": 4}, "hyena_filter_groups"),
        ({"smeared_gqa": True}, "smeared_gqa"),
        ({"attn_layer_idxs": [1]}, "hyena_layer_idxs"),
        ({"proj_groups": 4}, "proj_groups"),
        ({"mlp_activation": "swoosh"}, "mlp_activation"),
    ],
)
def test_what_we_do_not_have_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        stripedhyena.spec(CONFIG | change)


def test_stretched_positions_survive_a_round_trip() -> None:
    config = CONFIG | {"use_interpolated_rotary_pos_emb": True, "rotary_emb_scaling_factor": 16}
    spec = stripedhyena.spec(config)
    assert spec.attns[0].rope and spec.attns[0].rope.scaling and spec.attns[0].rope.scaling.factor == 16
    assert stripedhyena.spec(stripedhyena.config(spec)) == spec
