"""PPO losses, token rewards and their conventions against numbers worked out by hand."""

import itertools

import pytest
import torch

from caravan.algos.rl import ppo

CFG = ppo.Config()


def _one(ratio: float, adv: float, **kw) -> tuple[float, float]:
    """Loss and gradient with respect to the log-prob for one token."""
    logp = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    loss = ppo.policy_loss(
        logp,
        torch.zeros(1, dtype=torch.float64),
        torch.tensor([adv], dtype=torch.float64),
        1,
        ppo.Config(**kw),
    )
    loss.value.backward()
    return loss.value.item(), logp.grad.item()


@pytest.mark.parametrize(
    ("ratio", "adv", "kw", "value", "moves"),
    [
        (1.5, 1.0, {}, -1.2, False),
        (0.5, -1.0, {}, 0.8, False),
        (1.5, -1.0, {}, 1.5, True),
        (0.5, 1.0, {}, -0.5, True),
        (5.0, -1.0, {"dual_clip": 3.0}, 3.0, False),
        (5.0, 1.0, {"dual_clip": 3.0}, -1.2, False),
    ],
)
def test_clipped_surrogate(ratio: float, adv: float, kw: dict, value: float, moves: bool) -> None:
    got, gradient = _one(ratio, adv, **kw)
    assert got == pytest.approx(value)
    assert (gradient != 0) is moves


def test_gradient_at_ratio_1_is_the_policy_gradient() -> None:
    assert _one(1.0, 2.5) == (pytest.approx(-2.5), pytest.approx(-2.5))


def test_value_loss_has_its_half_and_takes_the_worse() -> None:
    value, old, ret = (torch.tensor([x]) for x in (2.0, 1.0, 5.0))
    assert float(ppo.value_loss(value, old, ret, 1, ppo.Config(value_clip=0.0)).value) == pytest.approx(4.5)
    clipped = ppo.value_loss(value, old, ret, 1, ppo.Config(value_clip=0.2))
    assert float(clipped.value) == pytest.approx(0.5 * (5 - 1.2) ** 2)
    assert float(clipped.stats["value_clipfrac"]) == 1.0


@pytest.mark.parametrize("n", [1, 5, 50])
def test_score_is_paid_once(n: int) -> None:
    zero = torch.zeros(n)
    assert float(ppo.shape_rewards(torch.ones(1), zero, zero, [n], 0.1).sum()) == 1.0


def test_shaped_reward_sums_to_score_minus_beta_k1() -> None:
    g = torch.Generator().manual_seed(0)
    lengths = [3, 1, 4]
    logp, ref = (torch.randn(8, generator=g, dtype=torch.float64) for _ in range(2))
    score = torch.randn(3, generator=g, dtype=torch.float64)
    reward = ppo.shape_rewards(score, logp, ref, lengths, 0.3)
    for r, x, s in zip(reward.split(lengths), (logp - ref).split(lengths), score, strict=True):
        assert float(r.sum()) == pytest.approx(float(s - 0.3 * x.sum()))
        torch.testing.assert_close(r[:-1], -0.3 * x[:-1])


def test_no_end_replaces_the_score_and_a_score_of_zero_is_a_score() -> None:
    score = torch.tensor([0.0, 7.0, -9.0])
    done = torch.tensor([True, False, False])
    assert ppo.no_end_score(score, done, -1.0).tolist() == [0.0, -1.0, -1.0]


def test_micro_batches_add_up() -> None:
    """Value, gradient and stats of a minibatch do not depend on how it is cut, given its normaliser."""
    g = torch.Generator().manual_seed(2)
    old, adv, new0, ret, entropy = (torch.randn(9, generator=g, dtype=torch.float64) for _ in range(5))
    cfg = ppo.Config(entropy=0.01, dual_clip=3.0)

    def run(cuts: list[int]) -> tuple[torch.Tensor, dict[str, float], torch.Tensor]:
        new = new0.clone().requires_grad_()
        total, stats = torch.zeros((), dtype=torch.float64), {}
        for a, b in itertools.pairwise(cuts):
            policy = ppo.policy_loss(new[a:b], old[a:b], adv[a:b], 9, cfg, entropy[a:b])
            value = ppo.value_loss(new[a:b], old[a:b], ret[a:b], 9, cfg)
            total = total + policy.value + value.value
            for name, x in (policy.stats | value.stats).items():
                stats[name] = stats.get(name, 0.0) + float(x)
        total.backward()
        return total.detach(), stats, new.grad

    whole = run([0, 9])
    for cuts in ([0, 4, 9], [0, 1, 2, 7, 9]):
        value, stats, grad = run(cuts)
        torch.testing.assert_close(value, whole[0])
        torch.testing.assert_close(grad, whole[2])
        assert stats == pytest.approx(whole[1])


def test_first_minibatch_statistics() -> None:
    logp = torch.randn(5)
    stats = ppo.policy_loss(logp, logp, torch.randn(5), 5, CFG).stats
    assert float(stats["approxkl"]) == 0.0 and float(stats["clipfrac"]) == 0.0
    assert ppo.ratio_error(logp, logp) == 0.0
    assert ppo.ratio_error(logp + 0.01, logp) == pytest.approx(0.01005, rel=1e-2)


def test_runaway_ratio_is_finite() -> None:
    logp = torch.tensor([0.0, -1e5], requires_grad=True)
    loss = ppo.policy_loss(logp, torch.tensor([-1e5, 0.0]), torch.tensor([-1.0, 1.0]), 2, CFG)
    loss.value.backward()
    assert torch.isfinite(loss.value) and torch.isfinite(logp.grad).all()


def test_nonsense_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ppo\.lam"):
        ppo.Config(lam=1.5)
