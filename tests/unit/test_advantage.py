"""GAE against hand values and a loop per episode; whitening against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caravan.algos.advantage import explained_variance, gae, whiten

REWARD, VALUE = (
    torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64),
    torch.tensor([0.5, 0.4, 0.6], dtype=torch.float64),
)


def _close(x: torch.Tensor, want: list[float], atol: float = 1e-6) -> None:
    torch.testing.assert_close(x, torch.tensor(want, dtype=x.dtype), rtol=0, atol=atol)


def test_hand_values() -> None:
    adv, ret = gae(REWARD, VALUE, [3])
    _close(adv, [0.451, 0.58, 0.4])
    _close(ret, [0.951, 0.98, 1.0])
    _close(whiten(adv), [-0.343236, 1.359742, -1.016506])
    _close(gae(REWARD, VALUE, [3], lam=1.0)[0], [0.5, 0.6, 0.4])  # return - value
    _close(gae(REWARD, VALUE, [3], lam=0.0)[0], [-0.1, 0.2, 0.4])  # one-step error


def _loop(reward: list[float], value: list[float], gamma: float, lam: float) -> list[float]:
    adv, last = [0.0] * len(reward), 0.0
    for t in reversed(range(len(reward))):
        after = value[t + 1] if t + 1 < len(reward) else 0.0
        last = reward[t] + gamma * after - value[t] + gamma * lam * last
        adv[t] = last
    return adv


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    gamma=st.sampled_from([1.0, 0.9]),
    lam=st.floats(0, 1),
)
def test_ragged_batch_equals_one_episode_at_a_time(lengths: list[int], gamma: float, lam: float) -> None:
    g = torch.Generator().manual_seed(sum(lengths))
    n = sum(lengths)
    reward, value = (torch.randn(n, generator=g, dtype=torch.float64) for _ in range(2))
    adv, ret = gae(reward, value, lengths, gamma=gamma, lam=lam)
    want: list[float] = []
    for r, v in zip(reward.split(lengths), value.split(lengths), strict=True):
        want += _loop(r.tolist(), v.tolist(), gamma, lam)
    _close(adv, want, 1e-12)
    torch.testing.assert_close(ret, adv + value)


def test_whitening_is_unmoved_by_padding() -> None:
    x = torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64)
    padded = torch.cat([x, torch.tensor([100.0, -7.0], dtype=torch.float64)])
    mask = torch.tensor([1, 1, 1, 0, 0], dtype=torch.bool)
    white = whiten(padded, mask)
    torch.testing.assert_close(white[:3], whiten(x))
    assert white[3:].tolist() == [0.0, 0.0]
    assert float(whiten(x).mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(whiten(x).var(correction=0)) == pytest.approx(1.0, abs=1e-8)
    assert float(whiten(x, shift_mean=False).mean()) == pytest.approx(1.0)


def test_whitening_over_ranks_uses_the_moments_of_all() -> None:
    """Two ranks that sum through `total` get what one rank with all the data gets."""
    x = torch.tensor([1.0, 4.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    parts = [x[:2], x[2:]]

    def on_rank(rank: int) -> torch.Tensor:
        mean, calls = x.mean(), []

        def total(own: torch.Tensor) -> torch.Tensor:
            other = parts[1 - rank]
            calls.append(own)
            if len(calls) == 1:
                return own + torch.stack([torch.tensor(float(len(other)), dtype=own.dtype), other.sum()])
            return own + (other - mean).square().sum()

        return whiten(parts[rank], total=total)

    torch.testing.assert_close(torch.cat([on_rank(0), on_rank(1)]), whiten(x))


def test_constant_advantages_do_not_blow_up() -> None:
    assert whiten(torch.full((4,), 3.0)).abs().max() == 0


def test_explained_variance() -> None:
    ret = torch.tensor([1.0, 2.0, 3.0])
    assert float(explained_variance(ret, ret)) == 1.0
    assert float(explained_variance(torch.full((3,), 7.0), ret)) == pytest.approx(0.0)
