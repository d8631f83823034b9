"""RWKV-4 to 7: kernels against their definitions, mixers that go on where they stopped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from caravan.kernels import wkv
from caravan.model import ffn as ffns
from caravan.model import mixers
from caravan.model.families import rwkv6, rwkv7
from caravan.model.mixers import knobs
from caravan.model.spec import FFN, Layer, Norm
from caravan.types import UserError
from tests.families.rwkv6 import CONFIG as CONFIG6
from tests.families.rwkv7 import CONFIG as CONFIG7
from tests.unit.recurrent import LENGTHS, Pass, Stack, agree, goes_on, stirred

D, H, K, V = 12, 3, 4, 5
each_lengths = pytest.mark.parametrize("lengths", LENGTHS, ids=str)
each_start = pytest.mark.parametrize("begun", [False, True], ids=["fresh", "begun"])
KNOBS: dict[str, Any] = {
    "rwkv4": knobs.Rwkv4(d_att=10),
    "rwkv5": knobs.Rwkv5(n_head=3, head_dim=4),
    "rwkv6": knobs.Rwkv6(n_head=3, head_dim=4, mix_rank=3, decay_rank=5),
    "rwkv7": knobs.Rwkv7(n_head=3, head_dim=4, decay_rank=5, rate_rank=3, value_rank=4, gate_rank=6),
}
each_mixer = pytest.mark.parametrize("name", KNOBS)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stack(name: str, count: int = 2) -> Stack:
    return stirred(Stack(D, Layer(mixer=name, ssm=KNOBS[name], norm=Norm()), count)).double()  # type: ignore[return-value]


@each_start
@each_lengths
def test_wkv4_is_its_definition(lengths: tuple[int, ...], begun: bool) -> None:
    n, s = sum(lengths), len(lengths)
    inputs = [-(2 * draw(D)).exp(), draw(D, seed=1), 8 * draw(n, D, seed=2), draw(n, D, seed=3)]
    if begun:
        inputs.append(torch.stack([draw(s, D, seed=4), draw(s, D, seed=5).abs() + 1, draw(s, D, seed=6)], 1))

    def whole(function: Any) -> Any:
        def run(*a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y, state = function(lengths, *a[:4], a[4] if begun else None)
            scale = torch.exp(state[:, 2] - 20)  # the sums themselves: how they are split may differ
            return y, state[:, :2] * scale[:, None]

        return run

    agree(whole(wkv.reference_wkv4), whole(wkv.wkv4), inputs)


@each_start
@each_lengths
def test_wkv6_is_its_definition(lengths: tuple[int, ...], begun: bool) -> None:
    n = sum(lengths)
    inputs = [draw(n, H, K), draw(n, H, K, seed=1), draw(n, H, V, seed=2), -(2 * draw(n, H, K, seed=3)).exp()]
    inputs += [draw(H, K, seed=4)] + ([draw(len(lengths), H, K, V, seed=5)] if begun else [])
    agree(lambda *a: wkv.reference_wkv6(lengths, *a), lambda *a: wkv.wkv6(lengths, *a), inputs)


@each_start
@each_lengths
def test_wkv7_is_its_definition(lengths: tuple[int, ...], begun: bool) -> None:
    n = sum(lengths)
    kk, rate = F.normalize(draw(n, H, K, seed=1), dim=-1), torch.sigmoid(draw(n, H, K, seed=2))
    inputs = [draw(n, H, K), -0.6065 * torch.sigmoid(4 * draw(n, H, K, seed=3)), draw(n, H, K, seed=4)]
    inputs += [draw(n, H, V, seed=5), -kk, kk * rate]
    inputs += [draw(len(lengths), H, V, K, seed=6)] if begun else []
    agree(lambda *a: wkv.reference_wkv7(lengths, *a), lambda *a: wkv.wkv7(lengths, *a), inputs)


def test_wkv4_stands_keys_that_overflow() -> None:
    k = torch.tensor([[0.0], [200.0], [-300.0], [1000.0], [5.0]]).repeat(12, 1)
    v = torch.linspace(-1, 1, 60)[:, None]
    w, u = torch.tensor([-30.0]), torch.tensor([40.0])
    y, last = wkv.wkv4((60,), w, u, k, v)
    want, _ = wkv.reference_wkv4((60,), w, u, k, v, None)
    assert torch.isfinite(y).all() and torch.isfinite(last).all() and torch.allclose(y, want, atol=1e-5)


def test_wkv6_stands_channels_that_forget_at_once() -> None:
    r, k, v = torch.randn(70, H, K), torch.randn(70, H, K), torch.randn(70, H, V)
    w = torch.tensor([-1e-6, -0.5, -20.0, -1e4]).expand(70, H, K)
    y, last = wkv.wkv6((70,), r, k, v, w, torch.randn(H, K))
    assert torch.isfinite(y).all() and torch.isfinite(last).all()
    u = torch.randn(H, K)
    assert torch.allclose(
        wkv.wkv6((70,), r, k, v, w, u)[0], wkv.reference_wkv6((70,), r, k, v, w, u)[0], atol=1e-4
    )


@each_mixer
def test_a_pass_goes_on_where_the_last_one_stopped(name: str) -> None:
    goes_on(stack(name), D)


@each_mixer
def test_state_is_fp32_and_sound_in_a_bf16_model(name: str) -> None:
    model = stack(name)
    x = draw(20, D)
    exact = model(x, Pass((20,))).detach()
    half, attend = model.bfloat16(), Pass((20,))
    rough = half(x.bfloat16(), attend).detach()
    assert rough.dtype == torch.bfloat16
    assert attend.after[0]["wkv"].dtype == torch.float32
    assert float((rough - exact).abs().max() / exact.std()) < 0.1


@pytest.mark.parametrize("kind", ["rwkv", "rwkv6", "rwkv7"])
def test_channel_mixing_goes_on_under_its_own_index(kind: str) -> None:
    mix = stirred(ffns.make(D, FFN(kind=kind, d_ff=20, act="relu2"))).double()

    class Alone(torch.nn.Module):
        def forward(self, x: torch.Tensor, attend: Any) -> torch.Tensor:
            return mix(x, 4, attend)

    goes_on(Alone(), D)
    attend = Pass((3,))
    mix(draw(3, D), 4, attend)
    assert set(attend.after) == {-5}


def test_the_first_layers_values_reach_the_later_ones_with_their_gradient() -> None:
    model = stack("rwkv7", 3)
    assert not hasattr(model.mixers[0], "v0") and hasattr(model.mixers[1], "v0")
    with torch.no_grad():
        model.mixers[2].v0.fill_(50.0)  # all of the first layer's values, none of its own
        model.mixers[0].o.weight.zero_()  # which the first layer itself does not use
    model(draw(9, D), Pass((9,))).sum().backward()
    assert float(model.mixers[2].v.weight.grad.abs().max()) < 1e-12
    assert float(model.mixers[0].v.weight.grad.abs().max()) > 1e-3


def test_widths_that_configs_leave_out() -> None:
    small = CONFIG7 | {"intermediate_size": None, "hidden_ratio": 2.5}
    assert rwkv7.spec(small).layers[0].ffn.d_ff == 128, "2.5 x 48 up to a multiple of 32"  # type: ignore[union-attr]
    wide = CONFIG6 | {"hidden_size": 4096, "attention_hidden_size": 4096, "intermediate_size": None}
    del wide["time_mix_extra_dim"], wide["time_decay_extra_dim"]
    spec = rwkv6.spec(wide)
    assert (spec.layers[0].ssm.mix_rank, spec.layers[0].ssm.decay_rank) == (64, 128)
    assert spec.layers[0].ffn.d_ff == 14336  # type: ignore[union-attr]


@pytest.mark.parametrize("key", ["attn", "value_dim", "norm_first", "hidden_act", "head_dim", "layout"])
def test_what_rwkv7_does_not_have_is_named(key: str) -> None:
    with pytest.raises(UserError, match=key):
        rwkv7.spec(
            CONFIG7 | {key: {"attn": {"layers": [1]}, "norm_first": False, "head_dim": 7}.get(key, "odd")}
        )


def test_rwkv7_never_forgets_faster_than_it_may() -> None:
    model = mixers.make(D, Layer(mixer="rwkv7", ssm=KNOBS["rwkv7"], norm=Norm()), 0, None).double()
    with torch.no_grad():
        model.w0.fill_(1e4)
    x = draw(70, D).requires_grad_()
    model(x, 0, [], Pass((70,))).sum().backward()
    assert torch.isfinite(x.grad).all()
