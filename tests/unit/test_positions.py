"""model.positions: frequencies worked out by hand, and positions in two streams."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from caravan.engine import needs
from caravan.kernels.attention import Segments
from caravan.model import sizes
from caravan.model.positions import by_length, inverse_frequencies, log_growth, sinusoid, two_streams
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, RopeScaling, Spec

PLAIN = 1.0 / 1e4 ** (torch.arange(0, 8, 2) / 8)


def test_scaled_frequencies_by_hand() -> None:
    plain = 1.0 / 1e4 ** (torch.arange(0, 8, 2) / 8)
    linear, one = inverse_frequencies(Rope(dim=8, scaling=RopeScaling(kind="linear", factor=4.0)))
    assert one == 1.0 and torch.allclose(linear, plain / 4)
    scaling = RopeScaling(
        kind="llama3", factor=8.0, original_context=100, low_freq_factor=1.0, high_freq_factor=4.0
    )
    llama3, _ = inverse_frequencies(Rope(dim=8, scaling=scaling))
    # turns in 100 positions: 15.9 kept; 1.59 in between; 0.159 and 0.0159 stretched
    keep = (100 * 0.1 / (2 * math.pi) - 1) / 3
    want = torch.tensor([1.0, 0.1 * (keep + (1 - keep) / 8), 0.01 / 8, 0.001 / 8])
    assert torch.allclose(llama3, want, rtol=1e-5)
    _, factor = inverse_frequencies(
        Rope(dim=8, scaling=RopeScaling(kind="yarn", factor=4.0, original_context=100))
    )
    assert factor == pytest.approx(0.1 * math.log(4) + 1)


def test_yarn_with_two_scales() -> None:
    def factor(**more: float) -> float:
        scaling = RopeScaling(kind="yarn", factor=4.0, original_context=100, **more)
        return inverse_frequencies(Rope(dim=8, scaling=scaling))[1]

    m = lambda x: 0.1 * x * math.log(4) + 1  # noqa: E731
    assert factor(mscale=0.7, mscale_all_dim=1.0) == pytest.approx(m(0.7) / m(1.0))
    assert factor(mscale=0.7) == pytest.approx(m(1.0)) and factor(attention_factor=1.5) == 1.5


DYNAMIC = Rope(dim=8, scaling=RopeScaling(kind="dynamic", factor=2.0, original_context=10))
LONG = Rope(
    dim=8,
    scaling=RopeScaling(
        kind="longrope",
        factor=4.0,
        original_context=10,
        short_factor=(1.0,) * 4,
        long_factor=(1.0, 2.0, 4.0, 8.0),
    ),
)


def at_length(rope: Rope, length: int) -> torch.Tensor:
    """Frequencies in a text of that many tokens."""
    return by_length(rope, torch.arange(length), (length,))[0][0]


def test_dynamic_frequencies_stretch_with_the_length() -> None:
    for length in (1, 5, 10):
        assert torch.allclose(at_length(DYNAMIC, length), PLAIN)
    theta = 1e4 * (2 * 15 / 10 - 1) ** (8 / 6)
    assert torch.allclose(at_length(DYNAMIC, 15), 1.0 / theta ** (torch.arange(0, 8, 2) / 8))


def test_powers_stretch_when_the_length_has_doubled() -> None:
    rope = replace(DYNAMIC, scaling=RopeScaling(kind="powers", original_context=10))
    for length, stretch in {1: 1, 10: 1, 11: 3, 20: 3, 21: 7, 40: 7, 41: 15, 10 * 2**12: 2**13 - 1}.items():
        theta = 1e4 * stretch ** (8 / 6)
        assert torch.allclose(at_length(rope, length), 1.0 / theta ** (torch.arange(0, 8, 2) / 8)), length
        regime = needs.regime(spec_of(rope))
        assert regime is not None and (regime(length) == regime(length - 1)) != (length in (11, 21, 41))


def test_queries_grow_with_the_logarithm_of_their_position() -> None:
    grown = log_growth(torch.arange(40), 10)
    assert grown.shape == (40, 1, 1) and grown[:10].unique().tolist() == [1.0]
    assert grown[10].item() == pytest.approx(math.log10(11))
    assert grown[39].item() == pytest.approx(math.log10(40))


def spec_of(rope: Rope) -> Spec:
    layer = Layer(attn=Attn(n_head=1, n_kv=1, head_dim=8, rope=rope), norm=Norm())
    return Spec(vocab=5, d=8, layers=(layer,), final_norm=None, max_pos=80)


def test_longrope_switches_beyond_the_original_context() -> None:
    assert torch.allclose(at_length(LONG, 10), PLAIN)
    assert torch.allclose(at_length(LONG, 11), PLAIN / torch.tensor([1.0, 2.0, 4.0, 8.0]))
    _, factor = by_length(LONG, torch.arange(3), (3,))
    assert factor == inverse_frequencies(LONG)[1] == pytest.approx(math.sqrt(1 + math.log(4) / math.log(10)))


def test_every_segment_has_the_frequencies_of_its_own_length() -> None:
    pos = torch.cat([torch.arange(4), torch.arange(12)])
    inv_NF, _ = by_length(LONG, pos, (4, 12))
    assert torch.allclose(inv_NF[0], PLAIN) and torch.allclose(inv_NF[4], at_length(LONG, 12))
    # a step of generation: one token at position 11
    assert torch.allclose(by_length(LONG, torch.tensor([11]), (1,))[0][0], inv_NF[4])


def test_two_streams_of_positions() -> None:
    pos = torch.cat([torch.arange(5), torch.arange(3)])
    streams = two_streams(pos, (5, 3), (3, 1))
    assert streams.tolist() == [[0, 1, 2, 2, 2, 0, 0, 0], [0, 0, 0, 1, 2, 0, 1, 2]]


def test_sections_are_turned_by_their_stream() -> None:
    rope = Rope(dim=8, sections=(2, 2))
    attn = Attn(n_head=1, n_kv=1, head_dim=8, rope=rope)
    layer = Layer(attn=attn, ffn=FFN(kind="mlp", d_ff=4, act="relu"), norm=Norm())
    model = sizes.fresh(Spec(vocab=5, d=8, layers=(layer,), final_norm=None, max_pos=8), seed=0)
    pos = torch.arange(5)
    ((cos, _),) = model.angles(pos, Segments((5,), prefix=(3,)))
    inv = 1.0 / 1e4 ** (torch.arange(0, 4, 2) / 4)
    place = torch.tensor([[0.0, 0.0], [1, 0], [2, 0], [2, 1], [2, 2]]).repeat_interleave(2, 1)
    assert torch.allclose(cos, torch.cos(place * inv.repeat(2)))
    ((given, _),) = model.angles(torch.stack([pos, pos]))
    assert torch.allclose(given, torch.cos(pos[:, None] * inv.repeat(2)))


def test_sinusoids_of_an_odd_width_end_in_zero() -> None:
    table = sinusoid(torch.tensor([3]), 7)
    assert table.shape == (1, 7) and table[0, -1] == 0 and table[0, 0] == pytest.approx(math.sin(3))
